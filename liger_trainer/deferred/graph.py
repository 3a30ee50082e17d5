"""The place of deferred logits in the autograd graph: gradients that reach the logits themselves.

A consumer sends its gradients directly to the head's operands. To the logits themselves it sends a
`DeferredGradient`, which is computed only on demand, so that hooks, `retain_grad` and
`torch.autograd.grad` get the same values as with plain logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import torch

from liger_trainer.deferred.head_call import Results, plain_call
from liger_trainer.deferred.origin import WAY_OUT
from liger_trainer.deferred.state import State
from liger_trainer.deferred.tensor import Deferred
from liger_trainer.kernels.autograd import depends_on, forbid_derivative, link_of


class Logits(Protocol):
    """What this file needs of deferred logits."""

    _state: State

    def original_value(self) -> torch.Tensor: ...


class _Like(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class DeferredGradient(Deferred):
    """The gradient of a consumer's results with respect to the logits, computed on demand.

    The operands have received this gradient already. `_extra` is a part from elsewhere, which they
    have not.
    """

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _make: Callable[[], torch.Tensor]
    _extra: torch.Tensor | None = None

    @classmethod
    def of(cls, like, make: Callable[[], torch.Tensor], extra=None) -> DeferredGradient:
        gradient = cls(like.shape, like.dtype, like.device)
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            # Anomaly detection reads every gradient, at a point where it cannot be computed.
            make = functools.cache(make)
            make()
        gradient._make, gradient._extra = make, extra
        return gradient

    def compute(self) -> torch.Tensor:
        value = self._make()
        return value if self._extra is None else value + self._extra

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Stay deferred when gradients are added up or retained (`retain_grad`)."""
        if func in (torch.ops.aten.clone.default, torch.ops.aten.detach.default):
            (x, *_) = args
            return cls.of(x, x._make, x._extra)
        if func is torch.ops.aten.add.Tensor and len(args) == 2 and not kwargs:
            deferred = [x for x in args if isinstance(x, DeferredGradient)]
            extras = [x._extra for x in deferred if x._extra is not None]
            extras += [x for x in args if not isinstance(x, DeferredGradient)]
            return cls.of(
                deferred[0],
                lambda: sum(x._make() for x in deferred),
                sum(extras) if extras else None,
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def _without_derivative(gradient: DeferredGradient, *operands) -> DeferredGradient:
    """Return `gradient`, which depends on `operands`, with a node in the graph of
    `create_graph=True` that raises when it is differentiated."""
    (link,) = forbid_derivative((torch.zeros(1),), operands)
    return _Linked.apply(lambda: gradient, link) if link.requires_grad else gradient


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make, link):
        return make()

    @staticmethod
    def backward(ctx, _):
        return None, torch.zeros(1)


class LogitsNode(torch.autograd.Function):
    """The node of deferred logits in the autograd graph; its inputs are operands or parents."""

    @staticmethod
    def forward(ctx, make, state, from_parents, *tensors):
        ctx.set_materialize_grads(False)
        # The node does not hold the logits, which would be a reference cycle.
        ctx.state, ctx.from_parents = state, from_parents
        ctx.parents = tensors if from_parents else ()
        return make()

    @staticmethod
    def backward(ctx, grad):
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            found = nothing
        elif not ctx.parents:
            with torch.no_grad():
                found = _to_operands(ctx, grad) or nothing
            origin = ctx.state.origin
            found = forbid_derivative(found, (origin.hidden, *origin.operands(), grad))
        elif isinstance(grad, DeferredGradient):
            found = _pass_on(ctx, grad)
        else:
            found = forbid_derivative(_to_parents(ctx, grad), (*ctx.parents, grad))
        return None, None, None, *found


def _pass_on(ctx, grad: DeferredGradient) -> list[DeferredGradient | None]:
    extras = (None,) * len(ctx.parents)
    if grad._extra is not None:
        extras = _to_parents(ctx, grad._extra)
    return [
        _without_derivative(
            DeferredGradient.of(parent, lambda i=i: _to_parents(ctx, grad._make())[i], extra),
            parent,
            grad,
        )
        if parent.requires_grad
        else None
        for i, (parent, extra) in enumerate(zip(ctx.parents, extras, strict=True))
    ]


def _to_parents(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    with torch.enable_grad():
        values = [p.original_value().detach().requires_grad_(p.requires_grad) for p in ctx.parents]
        value = ctx.from_parents(*values)
        wanted = [v for v in values if v.requires_grad]
        grads = iter(torch.autograd.grad(value, wanted, grad))
    return tuple(next(grads) if v.requires_grad else None for v in values)


def _to_operands(ctx, grad) -> tuple[torch.Tensor | None, ...] | None:
    """Return the gradients of hidden states and parameters for a gradient of the logits."""
    origin = ctx.state.origin
    if isinstance(grad, DeferredGradient):
        if grad._extra is None:
            return None
        grad = grad._extra
    elif origin.consumers:
        raise RuntimeError(
            "The gradient of deferred logits was changed on its way (by a hook or an autograd "
            "function), after the fused loss had used it. " + WAY_OUT
        )
    origin.check()
    hidden = origin.hidden.detach().requires_grad_(ctx.needs_input_grad[3])
    operands = (hidden, *origin.operands())
    with origin.restored(), torch.enable_grad():
        value = plain_call(origin.head, hidden)
    wanted = [t for t in operands if t.requires_grad]
    grads = iter(torch.autograd.grad(value, wanted, grad, allow_unused=True))
    return tuple(next(grads) if t.requires_grad else None for t in operands)


class _Results(torch.autograd.Function):
    """Return a consumer's results unchanged; backward also sends a deferred gradient to the
    logits."""

    @staticmethod
    def forward(ctx, logits, true_gradient, *results):
        ctx.set_materialize_grads(False)
        ctx.like = _Like(logits.shape, logits.dtype, logits.device)
        ctx.true_gradient = true_gradient
        depends_on(ctx, logits)
        # Clones, because views could not be changed in place (loss += ...).
        return tuple(r.clone() for r in results)

    @staticmethod
    def backward(ctx, *grads):
        of_logits = None
        if any(g is not None for g in grads):
            deferred = DeferredGradient.of(ctx.like, functools.partial(ctx.true_gradient, grads))
            of_logits = _without_derivative(deferred, link_of(ctx), *grads)
        return of_logits, None, *grads


def as_results_of(logits: Logits, results: Results, true_gradient: Callable) -> Results:
    """Return `results`, connected in the autograd graph to `logits`.

    `true_gradient(grads)` computes the logits' gradient from those of the differentiable results.
    """
    differentiable = [r for r in results if r is not None and r.requires_grad]
    if not differentiable:
        return results
    logits._state.origin.consumers.append(None)
    connected = iter(_Results.apply(logits, true_gradient, *differentiable))
    return tuple(next(connected) if r is not None and r.requires_grad else r for r in results)


def gradient_through(logits: Logits, plain: Callable, grads) -> torch.Tensor:
    """Return the logits' gradient: compute them and `plain` of them, and differentiate that."""
    with torch.enable_grad():
        z = logits.original_value().detach().requires_grad_()
        results = [r for r in plain(z) if r is not None and r.requires_grad]
    used = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    return torch.autograd.grad([r for r, _ in used], z, [g for _, g in used])[0]
