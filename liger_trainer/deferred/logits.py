"""Deferred logits: the output of a head, computed on first access.

The head returns `DeferredLogits`, which holds the head's input and follows what the model's own
forward does to logits (cast, multiply, divide, tanh, slice, view). The loss consumes them: it calls
the head (`head_call.py`) and computes loss and gradients where the weights are. So every model
keeps its own forward and its own loss function. Anything else that touches the logits gets their
value, bit for bit what the plain head computes, as a view of it where torch gives a view.

Gradients. A consumer sends its gradients to the head's operands directly, and along the logits
themselves a `DeferredGradient`, which is computed if somebody looks: hooks, `retain_grad` and
`torch.autograd.grad` see what they would see of plain logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer.deferred.head_call import Operands, Results, Term, consume
from liger_trainer.deferred.origin import WAY_OUT, Origin, device_of, seen_in, stamp_of
from liger_trainer.deferred.scope import RECORDED, Scope
from liger_trainer.deferred.tensor import Deferred
from liger_trainer.deferred.vocab_parallel import (
    in_place_of_linear,
    is_wrapped_shard,
    refuse_scattered,
)
from liger_trainer.kernels.autograd import forbid_derivative


@dataclasses.dataclass(frozen=True)
class State:
    """How deferred logits come from the head's input.

    `ops` is what happened to them, in order: ("cast", dtype), ("mul", c), ("div", c),
    ("tanh", None), ("log_softmax", None), ("move", device).
    """

    origin: Origin
    terms: tuple[Term, ...]
    ops: tuple[tuple[str, Any], ...] = ()

    def map_hidden(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> State:
        terms = tuple(term._replace(hidden=fn(term.hidden)) for term in self.terms)
        return dataclasses.replace(self, terms=terms)

    def then(self, name: str, value: object = None) -> State:
        return dataclasses.replace(self, ops=(*self.ops, (name, value)))

    @property
    def transform(self) -> tuple[float, float | None] | None:
        """(scale, softcap) of the logits; None if a kernel cannot express `ops`."""
        return as_scale_and_softcap(self.ops)

    @property
    def device(self) -> torch.device:
        moves = [argument for name, argument in self.ops if name == "move"]
        return moves[-1] if moves else self.origin.device

    @property
    def has_log_softmax(self) -> bool:
        return any(name == "log_softmax" for name, _ in self.ops)


def as_scale_and_softcap(ops) -> tuple[float, float | None] | None:
    """(scale, softcap) such that the ops are softcap * tanh(scale * z / softcap); else None.

    None also for factors that are so large or small that a step between them might overflow.
    """
    inner, outer = 1.0, None
    for name, argument in ops:
        if name == "move":
            return None
        if name in ("mul", "div"):
            factor = argument if name == "mul" else 1.0 / argument
            if outer is None:
                inner *= factor
            else:
                outer *= factor
            product = abs(inner if outer is None else inner * outer)
            if product and not 1 / _LARGE < product < _LARGE:
                return None
        elif name == "tanh":
            if outer is not None:
                return None
            outer = 1.0
    if outer is None:
        return inner, None
    return (inner * outer, outer) if outer > 0 else None


_LARGE = 2.0**32


OPS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "cast": lambda value, dtype: value.to(dtype),
    "mul": lambda value, factor: value * factor,
    "div": lambda value, divisor: value / divisor,
    "tanh": lambda value, _: torch.tanh(value),
    "log_softmax": lambda value, _: F.log_softmax(value, dim=-1),
    "move": lambda value, device: value.to(device),
}


def replay(ops, value: torch.Tensor) -> torch.Tensor:
    """Apply recorded ops to logits, by the very operations of the plain model."""
    for name, argument in ops:
        value = OPS[name](value, argument)
    return value


class DeferredLogits(Deferred):
    """Logits [..., V] that are computed when touched; see the module's docstring."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _state: State
    _parents: tuple[DeferredLogits, ...] = ()
    _from_parents: Callable  # the value, from the parents' values
    _shares_memory = False  # with its parent: what is written there is seen here
    _with_grad: bool
    _node: object = None  # the grad_fn that it was made with
    _direct: torch.Tensor | None = None  # the value without the detour by `_Results`
    _version_then = 0  # of that value, when it was computed
    _is_exposed = False  # to writes that no version counter tells of

    @property
    def state(self) -> State | None:
        """How to compute the logits; None once their value, or that whose view they are, exists:
        it may have been written to."""
        exists = self._value is not None or self._base_logits()._direct is not None
        return None if exists else self._state

    @property
    def linear_terms(self) -> tuple[Term, ...] | None:
        """The terms of an untouched sum of linear layers; else None."""
        return self._state.terms if self.state is not None and not self._state.ops else None

    @property
    def is_attached(self) -> bool:
        """Whether a consumer may send gradients to the operands directly."""
        return self.requires_grad and self._with_grad and self._state.origin.with_grad

    def compute(self) -> torch.Tensor:
        if self._shares_memory:
            return self._of(p.direct() for p in self._parents)
        return self._compute_anew()

    def _compute_anew(self) -> torch.Tensor:
        if self._parents:
            return self._of(p.unwritten() for p in self._parents)
        origin = self._state.origin
        origin.check()
        with origin.as_then():
            return plain_call(origin.head, origin.hidden)

    def _of(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        with torch.set_grad_enabled(self._with_grad):
            return self._from_parents(*values)

    def direct(self) -> torch.Tensor:
        if self._direct is None:
            self._direct = self.compute()
            self._version_then = self._direct._version
        return self._direct

    def unwritten(self) -> torch.Tensor:
        """Return the value as it was when others were derived from it, before any write to it."""
        base = self._base_logits()
        written = base._direct is not None and base._direct._version != base._version_then
        return self._compute_anew() if written or base._is_exposed else self.direct()

    def _base_logits(self) -> DeferredLogits:
        """Return the logits in whose memory these are."""
        base = self
        while base._shares_memory:
            (base,) = base._parents
        return base

    def materialize(self) -> torch.Tensor:
        value = self._value
        if value is None:
            value = self.direct()
            if self.is_attached and self._is_observed():
                (value,) = _joined(self, (value,), lambda grads: grads[0])
            elif not self.requires_grad:
                value = value.detach()
            elif not value.requires_grad:  # adopted by an autograd function
                value = super().materialize()
            assert value is not None
            self._value = value
        return value

    def detached_value(self) -> torch.Tensor:
        if self._direct is not None:
            return self._direct.detach()
        if self._shares_memory:
            return self._from_parents(*(p.detached_value() for p in self._parents))
        if self._parents:
            return self._from_parents(*(p.unwritten().detach() for p in self._parents))
        return super().detached_value()

    def _is_observed(self) -> bool:
        """Whether somebody waits for a gradient of the logits themselves."""
        as_own = self.grad_fn is self._node
        return not as_own or bool(self._backward_hooks) or self.retains_grad


def plain_call(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the head's logits, computed at once."""
    if not is_wrapped_shard(head):
        return nn.Module.__call__(head, hidden)

    def check(x, weight, bias, split):
        refuse_scattered(split)
        return NotImplemented

    with in_place_of_linear(head, check):
        return nn.Module.__call__(head, hidden)


def defer_call(head: nn.Module, hidden: torch.Tensor, vocabulary: int, fused: bool, scope: Scope):
    """Return the deferred logits of `head(hidden)`."""
    device = device_of(head, hidden)
    enabled = torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64
    autocast = (enabled, torch.get_autocast_dtype(device.type))
    origin = Origin(
        head=head,
        hidden=hidden,
        device=device,
        dtype=autocast[1] if enabled else hidden.dtype,
        fused=fused,
        scope=scope,
        with_grad=torch.is_grad_enabled(),
        autocast=autocast,
        seen=() if scope is RECORDED else seen_in(head),
        hidden_stamp=None if scope is RECORDED else stamp_of(hidden),
    )
    shape = (*hidden.shape[:-1], vocabulary)
    like = torch.empty(shape, dtype=origin.dtype, device="meta")
    return _make(State(origin, (Term(head, hidden),)), like, operands=(hidden, *origin.operands()))


def derive(parents, state: State, from_parents, like=None) -> DeferredLogits:
    """Return logits that follow from others; `from_parents` makes the value of their values.

    `like` has their shape, strides and dtype (by default from a dry run on the meta device).
    """
    shares = False
    if like is None:
        metas = [as_meta(p) for p in parents]
        like = from_parents(*metas)
        shares = like.untyped_storage()._cdata == metas[0].untyped_storage()._cdata
    made = _make(state, like, parents=tuple(parents), from_parents=from_parents)
    made._shares_memory = shares
    return made


def as_meta(logits: Deferred) -> torch.Tensor:
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")


def _make(state, like, operands=(), parents=(), from_parents=None) -> DeferredLogits:
    with_grad = torch.is_grad_enabled()

    def make():
        made = DeferredLogits(
            like.shape, like.dtype, state.device, like.stride(), like.storage_offset()
        )
        made._state, made._with_grad = state, with_grad
        made._parents, made._from_parents = parents, from_parents
        return made

    if not with_grad:
        return make()
    made = _LogitsNode.apply(make, state, from_parents, *(operands or parents))
    made._node = made.grad_fn
    return made


# --- gradients of the logits themselves ---------------------------------------------------------


class _Like(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class DeferredGradient(Deferred):
    """The gradient of a consumer's results in the logits, which the operands have already got.

    `_extra` is the part that came otherwise and is still to be sent on.
    """

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _make: Callable[[], torch.Tensor]
    _extra: torch.Tensor | None = None
    _create_graph: bool  # its own derivative, which there is none of, may be asked for

    @classmethod
    def of(
        cls, like, make: Callable[[], torch.Tensor], extra=None, create_graph=None
    ) -> DeferredGradient:
        gradient = cls(like.shape, like.dtype, like.device)
        enabled = torch.is_grad_enabled()
        gradient._create_graph = enabled if create_graph is None else create_graph
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            # Anomaly detection looks at every gradient, from where autograd cannot compute one.
            make = functools.cache(make)
            make()
        gradient._make, gradient._extra = make, extra
        return gradient

    def compute(self) -> torch.Tensor:
        value = self._make()
        value = value if self._extra is None else value + self._extra
        with torch.set_grad_enabled(self._create_graph):
            return forbid_derivative((value,))[0]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Stay deferred where gradients meet or are kept (`retain_grad`)."""
        if func in (torch.ops.aten.clone.default, torch.ops.aten.detach.default):
            (x, *_) = args
            return cls.of(x, x._make, x._extra, x._create_graph)
        if func is torch.ops.aten.add.Tensor and len(args) == 2 and not kwargs:
            deferred = [x for x in args if isinstance(x, DeferredGradient)]
            extras = [x._extra for x in deferred if x._extra is not None]
            extras += [x for x in args if not isinstance(x, DeferredGradient)]
            return cls.of(
                deferred[0],
                lambda: sum(x._make() for x in deferred),
                sum(extras) if extras else None,
                any(x._create_graph for x in deferred),
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


class _LogitsNode(torch.autograd.Function):
    """The place of deferred logits in the autograd graph; tensors: operands or parents."""

    @staticmethod
    def forward(ctx, make, state, from_parents, *tensors):
        ctx.set_materialize_grads(False)
        # The logits themselves are not held here: that would be a cycle.
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
            found = forbid_derivative(found)
        elif isinstance(grad, DeferredGradient):
            found = _pass_on(ctx, grad)
        else:
            found = forbid_derivative(_to_parents(ctx, grad))
        return None, None, None, *found


def _pass_on(ctx, grad: DeferredGradient) -> list[DeferredGradient | None]:
    extras = (None,) * len(ctx.parents)
    if grad._extra is not None:
        extras = _to_parents(ctx, grad._extra)
    return [
        DeferredGradient.of(parent, lambda i=i: _to_parents(ctx, grad._make())[i], extra)
        if parent.requires_grad
        else None
        for i, (parent, extra) in enumerate(zip(ctx.parents, extras, strict=True))
    ]


def _to_parents(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    with torch.enable_grad():
        values = [p.unwritten().detach().requires_grad_(p.requires_grad) for p in ctx.parents]
        value = ctx.from_parents(*values)
        wanted = [v for v in values if v.requires_grad]
        grads = iter(torch.autograd.grad(value, wanted, grad))
    return tuple(next(grads) if v.requires_grad else None for v in values)


def _to_operands(ctx, grad) -> tuple[torch.Tensor | None, ...] | None:
    """Send a gradient that came to the logits themselves to hidden states and parameters."""
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
    with origin.as_then(), torch.enable_grad():
        value = plain_call(origin.head, hidden)
    wanted = [t for t in operands if t.requires_grad]
    grads = iter(torch.autograd.grad(value, wanted, grad, allow_unused=True))
    return tuple(next(grads) if t.requires_grad else None for t in operands)


class _Results(torch.autograd.Function):
    """A consumer's results: their gradients go to the consumer, and along the logits deferred."""

    @staticmethod
    def forward(ctx, logits, true_gradient, *results):
        ctx.set_materialize_grads(False)
        ctx.like = _Like(logits.shape, logits.dtype, logits.device)
        ctx.true_gradient = true_gradient
        return tuple(
            r.clone() for r in results
        )  # views could not be changed in place (loss += ...)

    @staticmethod
    def backward(ctx, *grads):
        along = None
        if any(g is not None for g in grads):
            along = DeferredGradient.of(ctx.like, functools.partial(ctx.true_gradient, grads))
        return along, None, *grads


def _joined(logits: DeferredLogits, results: Results, true_gradient: Callable) -> Results:
    """Return `results` as autograd sees results of `logits`.

    `true_gradient(grads)` computes the logits' gradient from those of the differentiable results.
    """
    differentiable = [r for r in results if r is not None and r.requires_grad]
    if not differentiable:
        return results
    logits._state.origin.consumers.append(None)
    seen = iter(_Results.apply(logits, true_gradient, *differentiable))
    return tuple(next(seen) if r is not None and r.requires_grad else r for r in results)


def _gradient_through(logits: DeferredLogits, plain: Callable, grads) -> torch.Tensor:
    with torch.enable_grad():
        z = logits.unwritten().detach().requires_grad_()
        results = [r for r in plain(z) if r is not None and r.requires_grad]
    used = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    return torch.autograd.grad([r for r, _ in used], z, [g for _, g in used])[0]


# --- consumption ---------------------------------------------------------------------------------


def consume_logits(
    logits: DeferredLogits,
    fused: Callable[[list[Operands]], Results],
    plain: Callable[[torch.Tensor], Results],
    shards: bool = False,
) -> Results | None:
    """Return `fused(operands)`, evaluated inside the head's call, as results of `logits`.

    `plain(z)` must make the same results of the value z, and `shards` tells whether `fused` takes
    operands with some rows of the vocabulary. None if the logits turn out to be more than a sum of
    linear layers, or to have such operands where they are not taken.
    """
    state = logits.state
    state.origin.check()
    attached = logits.is_attached and torch.is_grad_enabled()
    if logits.requires_grad and not logits.is_attached:
        return None  # made under no_grad inside somebody's autograd function
    device = logits.device.type

    def cast(operands: list[Operands]) -> Results:
        dtype = state.origin.dtype
        with torch.autocast(device, enabled=False):
            return fused([o._replace(hidden=o.hidden.to(dtype)) for o in operands])

    with state.origin.as_then(), torch.set_grad_enabled(attached):
        results = consume(state.terms, cast, shards)
    if isinstance(results, torch.Tensor):
        return None
    if not attached:
        return results
    return _joined(logits, results, functools.partial(_gradient_through, logits, plain))
