"""Deferred logits: the output of a head, computed on first access.

The head returns `DeferredLogits`, which holds the head's input and records what the model's own
forward does to the logits (cast, multiply, divide, tanh, slice, view). The loss consumes them: it
calls the head (`head_call.py`) and computes loss and gradients there, where the weights are. So
every model keeps its own forward and its own loss function. Any other use of the logits gets their
value, bit for bit what the plain head computes, as a view if torch would return one.

For their place in the autograd graph, and for gradients of the logits themselves, see `graph.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import nn

from liger_trainer.deferred.graph import LogitsNode, as_results_of, gradient_through
from liger_trainer.deferred.head_call import (
    Results,
    Term,
    consume,
    is_recorded_at_once,
    plain_call,
    terms_of,
)
from liger_trainer.deferred.origin import Origin, device_of, snapshots_of, stamp_of
from liger_trainer.deferred.scope import RECORDED, Scope
from liger_trainer.deferred.state import State
from liger_trainer.deferred.tensor import Deferred
from liger_trainer.kernels.linear.head import LinearHead


class DeferredLogits(Deferred):
    """Logits [..., V] that are computed on first access; see the module's docstring."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _state: State
    _parents: tuple[DeferredLogits, ...] = ()
    _from_parents: Callable  # computes the value from the parents' values
    _shares_memory = False  # a view of its parent: writes to one show in the other
    _with_grad: bool
    _node: object = None  # the grad_fn that it was created with
    _direct: torch.Tensor | None = None  # the value, not connected to the logits by `graph.py`
    _direct_version = 0  # the version of that value when it was computed
    _retains_grad, _retained = False, None  # set by `retain_grad`; the gradient so far
    _is_exposed = False  # to writes that no version counter records

    @property
    def state(self) -> State | None:
        """How to compute the logits; None once their value exists, or the value they are a view of.

        That value may have been changed in place.
        """
        exists = self._value is not None or self._base_logits()._direct is not None
        return None if exists else self._state

    @property
    def linear_terms(self) -> tuple[Term, ...] | None:
        """The terms, if the logits are a sum of linear layers in the dtype of the head's GEMMs.

        A wider sum counts if it was cast to that dtype; any other operation changes the logits.
        """
        state = self.state
        if state is None or self.dtype != state.origin.dtype:
            return None
        return state.terms if state.ops in ((), (("cast", self.dtype),)) else None

    @property
    def is_attached(self) -> bool:
        """Whether a consumer may send gradients to the operands directly."""
        return self.requires_grad and self._with_grad and self._state.origin.with_grad

    def compute(self) -> torch.Tensor:
        if self._shares_memory:
            return self._from_values(p.direct() for p in self._parents)
        return self._recompute()

    def _recompute(self) -> torch.Tensor:
        if self._parents:
            return self._from_values(p.original_value() for p in self._parents)
        origin = self._state.origin
        origin.check()
        with origin.restored():
            return plain_call(origin.head, origin.hidden)

    def _from_values(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        with torch.set_grad_enabled(self._with_grad):
            return self._from_parents(*values)

    def direct(self) -> torch.Tensor:
        """Return the value; its gradients go to the operands, not through the logits' node."""
        if self._direct is None:
            self._direct = self.compute()
            self._direct_version = self._direct._version
        return self._direct

    def original_value(self) -> torch.Tensor:
        """Return the value as it was before any in-place change."""
        base = self._base_logits()
        changed = base._direct is not None and base._direct._version != base._direct_version
        return self._recompute() if changed or base._is_exposed else self.direct()

    def _base_logits(self) -> DeferredLogits:
        """Return the logits that these are a view of, or these."""
        base = self
        while base._shares_memory:
            (base,) = base._parents
        return base

    def materialize(self) -> torch.Tensor:
        value = self._value
        if value is None:
            value = self.direct()
            if self.is_attached and self._is_observed():
                (value,) = as_results_of(self, (value,), lambda grads: grads[0])
            elif not self.requires_grad:
                value = value.detach()
            elif not value.requires_grad:  # returned by an autograd function as its own output
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
            return self._from_parents(*(p.original_value().detach() for p in self._parents))
        return super().detached_value()

    def _is_observed(self) -> bool:
        """Return whether anything waits for a gradient of the logits themselves."""
        has_own_node = self.grad_fn is self._node
        return not has_own_node or bool(self._backward_hooks) or self.retains_grad


def defer_call(head: nn.Module, hidden: torch.Tensor, vocabulary: int, fused: bool, scope: Scope):
    """Return the deferred logits of `head(hidden)`.

    A composite head runs now, up to its last linear layers: once, as its dropout must. Its plain
    logits are returned if they are more than a sum of these.
    """
    device = device_of(head, hidden)
    kind = "cpu" if device.type == "meta" else device.type  # meta: in a trial without values
    enabled = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    autocast = (enabled, torch.get_autocast_dtype(kind))
    origin = Origin(
        head=head,
        hidden=hidden,
        device=device,
        dtype=autocast[1] if enabled else hidden.dtype,
        fused=fused,
        scope=scope,
        with_grad=torch.is_grad_enabled(),
        autocast=autocast,
        snapshots=() if scope is RECORDED else snapshots_of(head),
        hidden_stamp=None if scope is RECORDED else stamp_of(hidden),
    )
    terms = (Term(head, hidden),)
    if fused and is_recorded_at_once(head):
        origin.keep_dropout()
        terms = terms_of(head, hidden)
        if isinstance(terms, torch.Tensor):
            return terms
    shape = (*hidden.shape[:-1], vocabulary)
    like = torch.empty(shape, dtype=origin.dtype, device="meta")
    return _make(State(origin, terms), like, operands=(hidden, *origin.operands()))


def derive(parents, state: State, from_parents, like=None) -> DeferredLogits:
    """Return logits derived from `parents`; `from_parents(*values)` computes their value.

    `like` has their shape, strides and dtype; by default, `from_parents` runs on the meta device to
    find these.
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
    """Return an empty meta tensor with the shape, strides and dtype of `logits`."""
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
    made = LogitsNode.apply(make, state, from_parents, *(operands or parents))
    made._node = made.grad_fn
    return made


# --- consumption ---------------------------------------------------------------------------------


def consume_logits(
    logits: DeferredLogits,
    fused: Callable[[LinearHead], Results],
    plain: Callable[[torch.Tensor], Results],
    shards: bool = False,
    with_ops: bool = True,
) -> Results | None:
    """Return `fused(head)`, evaluated inside the head's call, as results of `logits`.

    `plain(z)` must compute the same results from materialized logits z. `shards` states whether
    `fused` takes a head that is split by rows of the vocabulary, and `with_ops` whether the head is
    to include the bias and the columns of the logits' state. Return None if the logits turn out to
    be more than a sum of linear layers, or if the head is split and `fused` takes no shards.
    """
    state = logits.state
    state.origin.check()
    attached = logits.is_attached and torch.is_grad_enabled()
    if logits.requires_grad and not logits.is_attached:
        return None  # created under no_grad, inside another autograd function
    device = logits.device.type

    def cast(head: LinearHead) -> Results:
        hidden = [h.to(state.origin.dtype) for h in head.hidden]
        with torch.autocast(device, enabled=False):
            head = dataclasses.replace(head, hidden=hidden)
            return fused(state.with_ops(head) if with_ops else head)

    with state.origin.restored(), torch.set_grad_enabled(attached):
        results = consume(state.terms, cast, shards and not state.changes_head)
    if isinstance(results, torch.Tensor):
        return None
    if not attached:
        return results
    return as_results_of(logits, results, functools.partial(gradient_through, logits, plain))
