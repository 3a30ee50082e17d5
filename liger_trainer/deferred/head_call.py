"""Calls of an output head, made by the consumer of its logits.

A deferred head is actually called when its logits are consumed: through `nn.Module.__call__`, with
every hook on it, but with the consumer's work in place of the head's own forward. The weights are
read there and nowhere else. So an engine that gathers weights before a module's forward, frees them
after it, gathers them again before its backward and reduces their gradients does all of this for
the loss as it would for the logits, and this module needs to know nothing about it.

Only tensors pass through the hooks. They get a one-element *anchor* that depends on the results:
what a hook registers on the module's output then runs before the backward of the results, and no
hook can round or change the results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from liger_trainer.deferred.scope import count_plain_call, recording
from liger_trainer.deferred.vocab_parallel import (
    LocalRows,
    in_place_of_linear,
    is_wrapped_shard,
    refuse_scattered,
)
from liger_trainer.hooks import is_hooked
from liger_trainer.kernels.autograd import Anchor
from liger_trainer.kernels.linear.head import LinearHead
from liger_trainer.swap import Swapped

Results = tuple[torch.Tensor | None, ...]


class Term(NamedTuple):
    """A linear layer onto the vocabulary and its input, to be called when consumed."""

    layer: nn.Module
    hidden: torch.Tensor
    scale: float = 1.0


Body = Callable[[torch.Tensor], "Results | torch.Tensor"]
Consumer = Callable[[LinearHead], "Results | torch.Tensor"]


class CallableHead(Swapped):
    """A module whose forward can be replaced for one call."""

    def forward(self, *args, **kwargs):
        body = _pending.take(self)
        if body is not None:
            return body(*args, **kwargs)
        # Not `self.weight`, because reading a parametrized weight computes it again.
        weight = self._parameters.get("weight")
        is_shard = isinstance(self, nn.Linear) and isinstance(weight, DTensor)
        if is_shard and not isinstance(args[0], DTensor):
            return F.linear(args[0], *weights_of(self))
        return super().forward(*args, **kwargs)


def plain_call(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the head's logits, computed immediately."""
    count_plain_call()
    if not is_wrapped_shard(head):
        return nn.Module.__call__(head, hidden)

    def check(x, weight, bias, split):
        refuse_scattered(split)
        return NotImplemented

    with in_place_of_linear(head, check):
        return nn.Module.__call__(head, hidden)


def weights_of(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias, gathered if they are sharded.

    They are sharded if the logits are consumed after the forward of the module that holds the head,
    and that module reshards its weights after forward (FSDP2 with a resharded root). Their gradient
    is averaged over the ranks and scattered, as for every other weight of that module.
    """
    weight, bias = layer.weight, layer.bias
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


class _Pending(threading.local):
    module: nn.Module | None = None
    body: Body | None = None

    def take(self, module: nn.Module) -> Body | None:
        if self.module is not module:
            return None
        body, self.module, self.body = self.body, None, None
        return body


_pending = _Pending()


def consume(
    terms: Sequence[Term], consumer: Consumer, shards: bool = False
) -> Results | torch.Tensor:
    """Call the layers of all terms, one inside the other, and `consumer` in the innermost.

    Return the consumer's results; or the plain logits, if a head turns out to be more than a sum of
    linear layers, or if it is split by rows of the vocabulary and `consumer` takes no `shards`.
    """
    return _call(list(terms), consumer, [], shards and len(terms) == 1)


def _call(terms: list[Term], consumer: Consumer, gathered: list[LinearHead], shards: bool = False):
    # Not a recursive closure, whose reference cycle would keep the graph alive.
    if not terms:
        return consumer(LinearHead.sum(gathered))
    (layer, hidden, scale), *rest = terms
    if scale != 1.0:
        hidden = hidden * scale

    def body(x, *_):
        if isinstance(x, LinearHead):
            return _call(rest, consumer, [*gathered, x])
        if isinstance(layer, nn.Linear):
            weight, bias = weights_of(layer)
            return _call(rest, consumer, [*gathered, LinearHead([x], [weight], bias)])
        return _inside_composite(layer, x, lambda own: _call(rest, consumer, [*gathered, own]))

    return _in_place_of_forward(layer, hidden, body, shards)


def _inside_composite(head: nn.Module, hidden: torch.Tensor, consumer: Consumer):
    """Consume the linear terms of a composite head, an adapter around a linear layer."""
    if any(isinstance(p, DTensor) for p in head.parameters()):
        raise RuntimeError(
            "The adapter on the output head lies in shards here: its logits are consumed after the "
            "forward of the module that holds it. Keep the weights of that module after its "
            "forward (reshard_after_forward=False for the root), or compute the loss in the "
            "model's forward, by giving it labels."
        )
    terms = terms_of(head, hidden)
    return terms if isinstance(terms, torch.Tensor) else consume(terms, consumer)


def is_recorded_at_once(head: nn.Module) -> bool:
    """Return whether a composite head may run when it is called: no engine gathers its weights."""
    return not isinstance(head, nn.Linear) and not is_hooked(*head.modules())


def terms_of(head: nn.Module, hidden: torch.Tensor) -> tuple[Term, ...] | torch.Tensor:
    """Run a composite head; return its linear terms, or its logits if these are not their sum."""
    with recording():
        logits = head._liger_base.forward(head, hidden)
    terms = getattr(logits, "linear_terms", None)
    if terms is None:
        return logits.materialize() if hasattr(logits, "materialize") else logits
    return terms


def _in_place_of_forward(module: nn.Module, hidden: torch.Tensor, body: Body, shards: bool):
    if not is_hooked(module):
        return body(hidden)
    results: list[Results] = []

    def forward(*args, **kwargs):
        found = body(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            return found
        results.append(found)
        return (_anchor_of(found, hidden),)

    def take(x, weight, bias, split):
        local = None if results else LocalRows.of(x, weight, bias, split)
        if local is None or not shards:
            return NotImplemented
        results.append(body(local.head))
        return local.leaving(_anchor_of(results[0], hidden))

    if is_wrapped_shard(module):
        with in_place_of_linear(module, take):
            returned = nn.Module.__call__(module, hidden)
    else:
        _pending.module, _pending.body = module, forward
        try:
            returned = nn.Module.__call__(module, hidden)
        finally:
            _pending.take(module)
    if not results:
        return returned
    if isinstance(returned, torch.Tensor):
        returned = (returned,)
    if not (isinstance(returned, tuple) and len(returned) == 1 and returned[0].shape == (1,)):
        raise RuntimeError(
            f"a forward hook on the output head ({type(module).__name__}) changes what it returns, "
            "which deferred logits cannot follow. Register it before the kernels are injected, or "
            "set fused_linear_cross_entropy to false in liger_kernel_config."
        )
    return _after_anchor(returned[0], results[0])


def _anchor_of(results: Results, hidden: torch.Tensor) -> torch.Tensor:
    differentiable = [r for r in results if r is not None and r.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        # The backward of the results waits for the gradient of the anchor.
        return Anchor.apply(*differentiable)
    return hidden.new_zeros(1)


def _after_anchor(anchor: torch.Tensor, results: Results) -> Results:
    """Return `results` such that their backward runs after the hooks on the anchor."""
    if not anchor.requires_grad:
        return results
    wanted = [r is not None and r.requires_grad for r in results]
    differentiable = (r for r, w in zip(results, wanted, strict=True) if w)
    ordered = iter(_AfterAnchor.apply(anchor, *differentiable))
    return tuple(next(ordered) if w else r for r, w in zip(results, wanted, strict=True))


class _AfterAnchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *results):
        ctx.set_materialize_grads(False)
        ctx.like = anchor.dtype, anchor.device
        return tuple(r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx, *grads):
        dtype, device = ctx.like
        return torch.zeros(1, dtype=dtype, device=device), *grads
