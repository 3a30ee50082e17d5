"""The output head, whose logits are deferred while a loss is computed, and the model around it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from liger_trainer.deferred import gradients, scope, token_scores, views  # noqa: F401  (handlers)
from liger_trainer.deferred.head_call import CallableHead, is_recorded_at_once, terms_of
from liger_trainer.deferred.logits import defer_call
from liger_trainer.deferred.vocab_parallel import is_transparent, is_wrapped_shard
from liger_trainer.hooks import foreign_hooks, has_backward_hooks
from liger_trainer.injection import probe
from liger_trainer.injection.rules.activation_memory import LeanModel
from liger_trainer.injection.rules.proposal import OVERRIDDEN, Proposal, Search, Swap, look_again
from liger_trainer.injection.rules.uncompiled import uncompiled, uncompiled_result
from liger_trainer.kernels.runtime import is_looked_into
from liger_trainer.swap import Swapped, has_foreign_forward, is_current, note, swap

FUSED = "fused_linear_cross_entropy"


class DeferredHead(CallableHead):
    """A linear layer onto the vocabulary, or an adapter around one, whose calls are deferred.

    Key: whether the loss fuses.
    """

    @classmethod
    def namespace(cls, base: type, fused: bool) -> dict[str, object]:
        call = uncompiled(cls.call) if fused else cls.call
        return {"__call__": call, "_liger_fused": fused}

    def call(self, *args, **kwargs):
        where = scope.scope_of(self)
        # An adapter may have changed the layer for this call alone (parametrized its weight, say).
        if scope.is_recording() and isinstance(self, nn.Linear) and _unfit(self, False) is None:
            where = scope.RECORDED
        unusual = where is None or _in_graph() or kwargs or len(args) != 1
        if unusual or not _can_defer(args[0], where):
            return super().__call__(*args, **kwargs)
        return defer_call(self, args[0], vocabulary(self), self._liger_fused, where)


def _can_defer(hidden_states: torch.Tensor, where: scope.Scope | None) -> bool:
    # One position per sequence is a decoding step.
    return (
        isinstance(hidden_states, torch.Tensor)
        and (where is scope.RECORDED or not hidden_states.is_meta)
        and hidden_states.dim() >= 2
        and hidden_states.shape[-2] != 1
        and not torch.is_inference_mode_enabled()
    )


def _in_graph() -> bool:
    """Return whether the forward is traced or transformed, so that nothing can be deferred."""
    return is_looked_into() or torch.compiler.is_exporting() or torch.jit.is_tracing()


class DeferringModel(Swapped):
    """The model that owns the head; key: whether the loss is fused with the head.

    Calls of the head are deferred in a forward that gets labels, and inside `loss_scope()`. The
    forward drops `skip_logits`, which Trainer passes for another kernel package in evaluation.

    Under torch.compile, the modules that the forward calls are compiled (the backbone, as one
    graph). The forward's own code and the loss function, through which deferred logits pass, are
    not.
    """

    @classmethod
    def namespace(cls, base: type, fused: bool) -> dict[str, object]:
        original = base.forward
        position = _position_of_labels(original)

        @functools.wraps(original)
        def forward(self, *args, skip_logits=None, **kwargs):
            if not is_current(self):
                return base.forward(self, *args, **kwargs)
            labels = kwargs.get("labels", args[position] if len(args) > position else None)
            if labels is None:
                labels = kwargs.get("shift_labels")
            if (labels is None and not scope.in_loss_scope()) or _in_graph():
                return original(self, *args, **kwargs)
            if not isinstance(self, LeanModel):  # LeanModel does this itself
                look_again(self)
            head = current_head(self)
            if head is None:
                return original(self, *args, **kwargs)
            before = scope.plain_calls()
            with scope.deferring(head):
                found = original(self, *args, **kwargs)
            note(self, _COMPUTED if fused and scope.plain_calls() != before else None)
            return found

        if not fused:
            return {"forward": forward, "_liger_fused": False}
        forward = functools.wraps(original)(uncompiled(forward, recursive=False))
        names = {"forward": forward, "_liger_fused": True}
        loss_function = getattr(base, "loss_function", None)
        if isinstance(loss_function, property):
            names["loss_function"] = loss_function.getter(uncompiled_result(loss_function.fget))
        return names


def _position_of_labels(forward: Callable) -> float:
    """Return the position of `labels` among the arguments of `forward`, not counting self."""
    names = list(inspect.signature(forward).parameters)[1:]
    return names.index("labels") if "labels" in names else float("inf")


def current_head(model: DeferringModel) -> DeferredHead | None:
    """Return the model's head; one that was replaced since the injection is swapped, too.

    If it cannot be deferred, record that in the report and return None.
    """
    head = model.get_output_embeddings()
    layers = [] if head is None else linear_layers(head)
    reason = _NONE if head is None else why_not_deferred(head, layers)
    if reason is None:
        for layer in layers:
            if not isinstance(layer, DeferredHead):
                swap(layer, DeferredHead, model._liger_fused)
        if model._liger_fused and not sums_linear_layers(head):
            reason = _NO_SUM
    if reason is None:
        return head
    note(model, reason)
    return None


_COMPUTED = "the model's own forward reads all logits"
_NO_SUM = "its adapter computes more than a sum of linear layers"
_NONE = "the model has no output embeddings, so no logits of a vocabulary"


def defers_logits(model: nn.Module) -> bool:
    """Return whether the loss of `model`'s logits is fused with its head."""
    fused = isinstance(model, DeferringModel) and bool(model._liger_fused)
    return fused and current_head(model) is not None


def propose_for_model(search: Search) -> Iterator[Proposal]:
    """Propose to defer calls of the head and of its linear layers in the model that owns it."""
    model, config = search.model, search.config
    fused = config.fused_linear_cross_entropy
    rule = FUSED if fused or not config.cross_entropy else "cross_entropy"
    head = search.output_embeddings
    if head is None:
        yield Proposal.not_applicable("", rule, _NONE)
        return
    names = {id(module): name for name, module in model.named_modules()}
    site = names.get(id(head), "")
    if not (fused or config.cross_entropy):
        yield Proposal.off(site, rule)
        return
    layers = linear_layers(head)
    reason = why_not_deferred(head, layers)
    if reason is None and fused and not sums_linear_layers(head):
        reason = _NO_SUM
    max_error = None
    if reason is None:
        precision = torch.get_float32_matmul_precision()
        max_error = _probe(search.device_of(head), fused, _has_bias(layers), precision)
        if max_error is None:
            reason = "the loss through the kernel differs from the plain one"
    if reason is not None:
        yield Proposal.refused(site, rule, reason)
        return
    reason = "logits deferred" if fused else "loss of given logits"
    swaps = [Swap(layer, DeferredHead, (fused,)) for layer in layers]
    swaps.append(Swap(model, DeferringModel, (fused,)))
    yield Proposal.swapped(site, rule, reason, *swaps, max_error=max_error)


def sums_linear_layers(head: nn.Module) -> bool:
    """Return whether the logits of an adapter on a head, as it is set now, are a sum of those of
    linear layers.

    Tested once for each setting, on a copy without values: where one process loads the weights for
    all, every process must come to the same answer. If an engine's hooks are needed to run the
    head, the answer is True, and a consumer of the logits finds out.
    """
    if not is_recorded_at_once(head) or torch.is_inference_mode_enabled():
        return True
    chosen = (str(getattr(head, name, None)) for name in _SETTINGS)
    setting = (*chosen, head.training, tuple(p.dtype for p in head.parameters()))
    tested, found = vars(head).get("_liger_sums", (None, False))
    if tested != setting:
        found = _records_terms(head)
        head._liger_sums = setting, found
    return found


_SETTINGS = "active_adapters", "merged_adapters", "disable_adapters"  # PEFT's names


def _records_terms(head: nn.Module) -> bool:
    try:
        twin = probe.meta_copy(head)
        for layer in linear_layers(twin):
            if not isinstance(layer, DeferredHead):
                swap(layer, DeferredHead, True)
        inner = twin
        while not isinstance(inner, nn.Linear):
            inner = getattr(inner, "base_layer", None) or inner.original_module
        weight = inner.weight
        hidden = torch.empty((1, 2, weight.shape[1]), dtype=weight.dtype, device="meta")
        with probe.random_state_kept(()), torch.no_grad():
            return not isinstance(terms_of(twin, hidden), torch.Tensor)
    except Exception:  # third-party modules may raise anything
        return False


def linear_layers(head: nn.Module) -> list[nn.Module]:
    """Return the head and, if it is an adapter, its linear layers onto the vocabulary."""
    size = vocabulary(head)
    inner = [
        m
        for m in head.modules()
        if m is not head and isinstance(m, nn.Linear) and vocabulary(m) == size
    ]
    return [head, *inner]


def why_not_deferred(head: nn.Module, layers: list[nn.Module]) -> str | None:
    """Return the reason why calls of `head` cannot be deferred, or None."""
    kind = type(head).__name__
    if vocabulary(head) is None:
        return f"{kind} is not a plain linear layer"
    if hasattr(head, "parameter_name"):
        return f"the adapter changes the parameter {head.parameter_name}, it adds nothing to logits"
    adapter = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
    if not isinstance(head, nn.Linear) and not (adapter and len(layers) > 1):
        return f"{kind} is not a plain linear layer"
    reasons = (_unfit(layer, layer is head) for layer in layers)
    return next((reason for reason in reasons if reason is not None), None)


_PLAIN_FORWARD = nn.Linear.forward  # kept, because code may replace it for the whole process
_WEIGHTS = (torch.Tensor, nn.Parameter, DTensor)


def _unfit(layer: nn.Module, is_head: bool) -> str | None:
    """Return the reason why calls of one layer of a head cannot be deferred, or None."""
    own = getattr(type(layer), "_liger_base", type(layer)).forward
    if isinstance(layer, nn.Linear) and own is not _PLAIN_FORWARD:
        return f"{type(layer).__name__} is not a plain linear layer"
    if not is_head and is_wrapped_shard(layer):
        return "an adapter on a head that is split over ranks"
    if has_foreign_forward(layer) and not is_transparent(layer):
        return OVERRIDDEN
    if foreign_hooks(layer):
        return "it has forward hooks, which would not see the logits"
    if has_backward_hooks(layer):
        return "it has backward hooks, which would not see the gradient of the logits"
    if hasattr(layer, "parametrizations"):
        return "it is parametrized"
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Linear) and weight is not None and type(weight) not in _WEIGHTS:
        return f"its weight is of type {type(weight).__name__}"
    return None


def vocabulary(head: nn.Module) -> int | None:
    """Return the size of the vocabulary, also if the head holds only a shard of it."""
    inner = getattr(head, "base_layer", None) or getattr(head, "original_module", None)
    if isinstance(inner, nn.Module):
        return vocabulary(inner)
    if not isinstance(head, nn.Linear):
        return None
    for parameter in head.parameters(recurse=False):
        if parameter.dim() == 2 and parameter.numel():
            return parameter.shape[0]
    return head.out_features


def _has_bias(layers: list[nn.Module]) -> bool:
    return any(getattr(layer, "bias", None) is not None for layer in layers)


@functools.cache
def _probe(device: torch.device, fused: bool, has_bias: bool, precision: str) -> float | None:
    """Return the difference in fp32 that deferring makes to loss and gradients of a small head.

    Return None if their error is larger than the plain head's, which is large too if TF32 is
    enabled (`precision`). No model takes part in it, so it is done once per process.
    """
    vocab, width, tokens = 50, 16, 24
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    labels = labels.to(device)
    shapes = [(tokens, width), (vocab, width)] + [(vocab,)] * has_bias
    inputs = tuple(probe.draw(s, 1.0, device, i).requires_grad_() for i, s in enumerate(shapes))

    def loss(defers: bool, hidden, weight, bias=None):
        with torch.device("meta"):
            layer = nn.Linear(width, vocab, bias is not None)
        del layer.weight, layer.bias  # to put tensors in the place of parameters
        layer.weight, layer.bias = weight, bias
        if not defers:
            return F.cross_entropy(layer(hidden).float(), labels)
        swap(layer, DeferredHead, fused)
        with scope.deferring(layer):
            return F.cross_entropy(layer(hidden).float(), labels)

    case = probe.Case(inputs, "a small head")
    truth = probe.evaluate(functools.partial(loss, False), case.cast(torch.float64))
    plain, deferred = (
        probe.evaluate(functools.partial(loss, defers), case) for defers in (False, True)
    )
    of_plain, error = (max(map(probe.relative_error, found, truth)) for found in (plain, deferred))
    if not error <= probe.FACTOR * of_plain + probe.TOLERANCE_FP32:
        return None
    return max(map(probe.relative_error, deferred, plain))
