"""The output head, whose logits are deferred, and the model around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer import probe, token_scores  # noqa: F401  (teaches deferred logits to score)
from liger_trainer.head_state import HeadState, Term
from liger_trainer.logits import defer
from liger_trainer.report import Row
from liger_trainer.rules.finding import SWITCHED_OFF, Finding, Search
from liger_trainer.swap import Swapped

FUSED = "fused_linear_cross_entropy"


@functools.cache
def _uncompiled(function: Callable, recursive: bool = True) -> Callable:
    reason = (
        "liger_trainer defers logits here; for one full graph set fused_linear_cross_entropy "
        "to false in liger_kernel_config"
    )
    return torch.compiler.disable(function, recursive=recursive, reason=reason)


class DeferredLinear(Swapped):
    """A linear layer onto the vocabulary whose result is deferred; key: whether the loss fuses."""

    @classmethod
    def namespace(cls, base: type, fused: bool) -> dict[str, object]:
        return {"forward": _uncompiled(cls.deferred_forward) if fused else cls.deferred_forward}

    def deferred_forward(self, hidden_states):
        # One position per sequence is a decoding step; a weight without elements is a shard.
        plain = hidden_states.dim() < 2 or hidden_states.shape[-2] == 1 or not self.weight.numel()
        if plain or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return self._liger_base.forward(self, hidden_states)
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        term = Term(hidden_states, self.weight)
        return defer(HeadState((term,), self.bias, dtype, fused=self._liger_key[0]))


class DeferringModel(Swapped):
    """The model that owns the head; key: whether the loss fuses.

    Its forward drops `skip_logits`, which Trainer passes for another kernel package in evaluation
    (logits are never built there unless used).

    Under torch.compile, what the forward calls is compiled (the backbone, as one graph), while the
    forward's own lines and the loss function, through which deferred logits pass, run as they are.
    """

    @classmethod
    def namespace(cls, base: type, fused: bool) -> dict[str, object]:
        original = base.forward

        @functools.wraps(original)
        def forward(self, *args, skip_logits=None, **kwargs):
            return original(self, *args, **kwargs)

        if not fused:
            return {"forward": forward}
        names = {"forward": functools.wraps(original)(_uncompiled(forward, recursive=False))}
        loss_function = getattr(base, "loss_function", None)
        if isinstance(loss_function, property):
            getter = _uncompiled(lambda self: _uncompiled(loss_function.fget(self)))
            names["loss_function"] = loss_function.getter(getter)
        return names


def examine_model(search: Search) -> Iterator[Finding]:
    """The head's linear layers, then the model."""
    model, config = search.model, search.config
    fused = config.fused_linear_cross_entropy
    rule = FUSED if fused or not config.cross_entropy else "cross_entropy"
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        reason = "the model has no output embeddings, so no logits of a vocabulary"
        yield Finding(Row("", rule, False, reason, eligible=False))
        return
    site = next((name for name, m in model.named_modules() if m is embeddings), "")
    if not (fused or config.cross_entropy):
        yield Finding(Row(site, rule, False, SWITCHED_OFF, eligible=False))
        return
    layers = [(n, m) for n, m in model.named_modules() if _is_head_layer(n, site, m, embeddings)]
    if not layers:
        reason = f"{type(embeddings).__name__} is not a plain linear layer"
        yield Finding(Row(site, rule, False, reason))
        return
    for name, layer in layers:
        max_error = _probe(layer, search.device_of(layer), fused)
        reason = "logits deferred, loss in chunks" if fused else "loss of given logits"
        if max_error is None:
            reason = "the loss through the kernel differs from the plain one"
        row = Row(name, rule, max_error is not None, reason, max_error)
        yield Finding(row, layer, DeferredLinear, (fused,))
    row = Row("", "model", True, "own forward and loss kept", eligible=False)
    yield Finding(row, model, DeferringModel, (fused,))


def _is_head_layer(name: str, site: str, module: nn.Module, embeddings: nn.Module) -> bool:
    """The head itself, or inside a wrapper (adapter) the linear layers onto the vocabulary."""
    inside = name == site or name.startswith(f"{site}.")
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return inside and plain and module.out_features == _vocabulary(embeddings)


def _vocabulary(embeddings: nn.Module) -> int | None:
    weight = getattr(embeddings, "weight", None)
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None


def _probe(layer: nn.Linear, device: torch.device, fused: bool) -> float | None:
    """The fp32 error of loss and gradients through a small head of the layer's kind.

    None if it is larger than the plain head's: with TF32 switched on, that is large too.
    """
    vocab, width, tokens = 50, 16, 24
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    labels = labels.to(device)
    shapes = [(tokens, width), (vocab, width)] + [(vocab,)] * (layer.bias is not None)
    inputs = tuple(probe.draw(s, 1.0, device, i).requires_grad_() for i, s in enumerate(shapes))

    def plain(hidden, weight, bias=None):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)

    def deferred(hidden, weight, bias=None):
        state = HeadState((Term(hidden, weight),), bias, hidden.dtype, fused)
        return F.cross_entropy(defer(state).float(), labels)

    case = probe.Case(inputs, "a small head")
    truth = probe.evaluate(plain, case.cast(torch.float64))
    errors = []
    for function in (plain, deferred):
        results = probe.evaluate(function, case)
        errors.append(max(map(probe.relative_error, results, truth)))
    allowed = probe.FACTOR * errors[0] + probe.TOLERANCE_FP32
    return errors[1] if errors[1] <= allowed else None
