"""Deferred logits: a head's output that exists only if somebody looks at it.

The head returns `DeferredLogits`, which holds hidden states and weights, follows what the model's
own forward does to logits (cast, multiply, divide, tanh, slice, view) and lets
`torch.nn.functional.cross_entropy` reach the fused kernel, whoever calls it. So every model keeps
its own forward and its own loss function. Anything else that touches the logits gets their value,
bit for bit what the plain head computes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from liger_trainer.deferred import Attach, Deferred
from liger_trainer.head_state import HeadState, Term, summarise
from liger_trainer.kernels.cross_entropy import cross_entropy
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.loss import LossOptions

_Tensor = torch.Tensor


class DeferredLogits(Deferred):
    """Logits [..., V] that are computed when touched; see the module's docstring."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _state: HeadState
    _replaced_by: torch.Tensor | None = None  # after an in-place operation
    _has_views = False

    @property
    def state(self) -> HeadState | None:
        """How to compute the logits; None once their value exists."""
        if self._replaced_by is not None:
            other = self._replaced_by
            return other.state if isinstance(other, DeferredLogits) else None
        return self._state if self._value is None else None

    def compute(self) -> torch.Tensor:
        if self._replaced_by is not None:
            other = self._replaced_by
            return other.materialise() if isinstance(other, Deferred) else other
        self._state.check_versions()
        return self._state.compute()


def defer(state: HeadState) -> DeferredLogits:
    """The logits that `state` describes; made under no_grad they have no gradient later either."""
    if not torch.is_grad_enabled():
        state = state.detach()
    if not state.versions:
        versions = tuple(t._version for t in state.operands if t is not None)
        state = dataclasses.replace(state, versions=versions)

    def make():
        deferred = DeferredLogits(state.shape, state.current_dtype, state.terms[0].hidden.device)
        deferred._state = state
        return deferred

    return Attach.apply(make, state.compute, *state.operands)


# --- what deferred logits answer themselves ---------------------------------------------------


def answers(*functions):
    """Registers a handler of deferred logits for these functions of torch."""

    def register(handler):
        for function in functions:
            DeferredLogits.handlers[function] = handler
        return handler

    return register


def _record(logits, name, argument=None):
    state = logits.state
    if state is None or any(op == "log_softmax" for op, _ in state.ops):
        return NotImplemented
    return defer(state.then(name, argument))


def _cast(logits, dtype):
    state = logits.state
    if state is None or not dtype.is_floating_point:
        return NotImplemented
    return logits if dtype == state.current_dtype else defer(state.then("cast", dtype))


answers(_Tensor.float)(lambda x: _cast(x, torch.float32))
answers(_Tensor.half)(lambda x: _cast(x, torch.float16))
answers(_Tensor.bfloat16)(lambda x: _cast(x, torch.bfloat16))
answers(_Tensor.double)(lambda x: _cast(x, torch.float64))


@answers(_Tensor.to)
def _to(logits, *args, **kwargs):
    """`.to` with a dtype, and a device if it is the logits' own; anything else needs the value."""
    wanted = [*args, *(v for k, v in kwargs.items() if k in ("dtype", "device"))]
    if set(kwargs) - {"dtype", "device", "non_blocking"} or not isinstance(logits, DeferredLogits):
        return NotImplemented
    dtype = logits.dtype
    for argument in wanted:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, (str, int, torch.device)) and not isinstance(argument, bool):
            device = torch.device(argument)
            if device.type != logits.device.type or device.index not in (None, logits.device.index):
                return NotImplemented
        elif argument is not None and not isinstance(argument, bool):
            return NotImplemented
    return _cast(logits, dtype)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


@answers(torch.mul, torch.multiply, _Tensor.mul, _Tensor.multiply, _Tensor.__mul__,
          _Tensor.__rmul__)  # fmt: skip
def _mul(a, b, **kwargs):
    logits, factor = (a, b) if isinstance(a, DeferredLogits) else (b, a)
    return NotImplemented if kwargs or not _is_number(factor) else _record(logits, "mul", factor)


@answers(torch.div, torch.divide, torch.true_divide, _Tensor.div, _Tensor.divide,
          _Tensor.true_divide, _Tensor.__truediv__)  # fmt: skip
def _div(a, b, **kwargs):
    if kwargs or not isinstance(a, DeferredLogits) or not _is_number(b) or b == 0:
        return NotImplemented
    return _record(a, "div", b)


@answers(torch.tanh, _Tensor.tanh, F.tanh)
def _tanh(logits, **kwargs):
    return NotImplemented if kwargs else _record(logits, "tanh")


@answers(F.log_softmax, torch.log_softmax, _Tensor.log_softmax)
def _log_softmax(logits, dim=None, _stacklevel=3, dtype=None):
    if dim not in (-1, logits.ndim - 1):
        return NotImplemented
    if dtype is not None:
        logits = _cast(logits, dtype)
        if logits is NotImplemented:
            return NotImplemented
    return _record(logits, "log_softmax")


@answers(torch.add, _Tensor.add, _Tensor.__add__, _Tensor.__radd__)
def _add(a, b, **kwargs):
    """The sum of two linear maps: a head and the low-rank adapter on it."""
    if kwargs or not (isinstance(a, DeferredLogits) and isinstance(b, DeferredLogits)):
        return NotImplemented
    base, other = a.state, b.state
    if base is None or other is None or base.shape != other.shape or base.dtype != other.dtype:
        return NotImplemented
    if (
        other.bias is not None
        or base.ops
        or any(name not in ("mul", "div") for name, _ in other.ops)
    ):
        return NotImplemented
    scale, _ = summarise(other.ops)
    scaled = tuple(Term(term.hidden * scale, term.weight) for term in other.terms)
    return defer(dataclasses.replace(base, terms=base.terms + scaled, versions=()))


def _in_place(functional):
    """x op= c: the result takes the place of x, whose own views would then be stale."""

    def handler(logits, *args, **kwargs):
        if not isinstance(logits, DeferredLogits) or logits.state is None:
            return NotImplemented
        result = functional(logits, *args, **kwargs)
        if result is NotImplemented:
            return NotImplemented
        if logits._has_views or result.dtype != logits.dtype:
            raise RuntimeError(
                "Logits were changed in place while a view of them is in use. "
                "Write `logits = logits * c`, or set fused_linear_cross_entropy to false."
            )
        logits._replaced_by = result
        return result

    return handler


answers(_Tensor.mul_, _Tensor.multiply_, _Tensor.__imul__)(_in_place(_mul))
answers(_Tensor.div_, _Tensor.divide_, _Tensor.__itruediv__, _Tensor.__idiv__)(_in_place(_div))
answers(torch.tanh_, _Tensor.tanh_)(_in_place(_tanh))


def _view(logits, fn):
    """The same logits for other tokens; `fn` acts on the hidden states."""
    view = defer(logits.state.map_hidden(fn))
    view._has_views = logits._has_views = True
    return view


@answers(_Tensor.contiguous)
def _contiguous(logits, memory_format=torch.contiguous_format):
    return logits if logits.state is not None else NotImplemented


@answers(_Tensor.clone, torch.clone)
def _clone(logits, memory_format=None):
    return defer(logits.state) if logits.state is not None else NotImplemented


@answers(_Tensor.detach, torch.detach)
def _detach(logits):
    state = logits.state
    if state is None:
        return NotImplemented
    return defer(state.detach())


@answers(_Tensor.view, _Tensor.reshape, torch.reshape)
def _reshape(logits, *shape):
    if logits.state is None or not shape or isinstance(shape[0], torch.dtype):
        return NotImplemented
    shape = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    vocab = logits.shape[-1]
    if shape.count(-1) == 1:
        known = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = logits.numel() // known if known else 0
    if not shape or shape[-1] != vocab or math.prod(shape) != logits.numel():
        return NotImplemented
    return _view(logits, lambda hidden: hidden.reshape(*shape[:-1], hidden.shape[-1]))


@answers(_Tensor.flatten, torch.flatten)
def _flatten(logits, start_dim=0, end_dim=-1):
    end = end_dim % logits.ndim
    if logits.state is None or end == logits.ndim - 1:
        return NotImplemented
    return _view(logits, lambda hidden: hidden.flatten(start_dim % logits.ndim, end))


@answers(_Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(logits, dim):
    if logits.state is None or dim == -1 or dim >= logits.ndim:
        return NotImplemented
    return _view(logits, lambda hidden: hidden.unsqueeze(dim))


@answers(_Tensor.squeeze, torch.squeeze)
def _squeeze(logits, dim=None):
    if logits.state is None or not isinstance(dim, int) or dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    return _view(logits, lambda hidden: hidden.squeeze(dim))


@answers(_Tensor.__getitem__)
def _getitem(logits, index):
    if logits.state is None or not _leaves_vocabulary(index, logits.ndim):
        return NotImplemented
    return _view(logits, lambda hidden: hidden[index])


def _leaves_vocabulary(index, ndim: int) -> bool:
    """Whether `index` selects tokens only, each with its whole vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = 0
    for part in parts:
        if torch.is_tensor(part):
            consumed += part.dim() if part.dtype == torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            consumed += 1
        elif part is not None and part is not Ellipsis:
            return False
    reaches_last = consumed >= ndim or any(
        part is Ellipsis and i < len(parts) - 1 for i, part in enumerate(parts)
    )
    if not reaches_last:
        return True
    last = parts[-1]
    return isinstance(last, slice) and last == slice(None)


@answers(torch.argmax, _Tensor.argmax)
def _argmax(logits, dim=None, keepdim=False):
    """Token by token, a few at a time, so that metrics need no full logits."""
    state = logits.state
    if state is None or dim is None or dim % logits.ndim != logits.ndim - 1:
        return NotImplemented
    state.check_versions()
    flat = state.map_hidden(lambda hidden: hidden.reshape(-1, hidden.shape[-1]))
    rows = max(1, (64 << 20) // (4 * logits.shape[-1]))
    with torch.no_grad():
        found = [
            flat.map_hidden(lambda h, start=start: h[start : start + rows]).compute().argmax(-1)
            for start in range(0, flat.shape[0], rows)
        ]
    ids = torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=logits.device)
    ids = ids.reshape(logits.shape[:-1])
    return ids.unsqueeze(-1) if keepdim else ids


@answers(F.cross_entropy)
def _cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                   reduction="mean", label_smoothing=0.0):  # fmt: skip
    if not isinstance(input, DeferredLogits) or size_average is not None or reduce is not None:
        return NotImplemented
    state = input.state
    if state is None or isinstance(target, Deferred) or isinstance(weight, Deferred):
        return NotImplemented
    if input.ndim != 2 or target.dtype != torch.int64 or target.shape != input.shape[:1]:
        return NotImplemented
    kwargs = {"class_weight": weight, "reduction": reduction}
    if not state.fused:
        options = LossOptions(ignore_index, label_smoothing)
        loss = cross_entropy(input.materialise(), target, options=options, **kwargs)
        return loss.to(input.dtype)
    transform = summarise(state.ops)
    if transform is None:
        return NotImplemented
    state.check_versions()
    options = LossOptions(ignore_index, label_smoothing, 0.0, *transform)
    with torch.autocast(input.device.type, enabled=False):
        loss = linear_cross_entropy(
            [term.hidden.to(state.dtype) for term in state.terms],
            [term.weight for term in state.terms],
            target,
            state.bias,
            options=options,
            **kwargs,
        )
    return loss.to(input.dtype)


@answers(F.nll_loss)
def _nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
              reduction="mean"):  # fmt: skip
    state = input.state if isinstance(input, DeferredLogits) else None
    if state is None or not any(name == "log_softmax" for name, _ in state.ops):
        return NotImplemented
    return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction)
