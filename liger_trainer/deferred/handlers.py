"""Losses and elementwise torch functions that deferred logits implement without their value.

`views.py` has the functions that select tokens, `gradients.py` those that request gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

from liger_trainer.deferred.logits import DeferredLogits, as_meta, consume_logits, derive
from liger_trainer.deferred.scope import RECORDED
from liger_trainer.deferred.state import OPS, as_scale_and_softcap, replay
from liger_trainer.deferred.tensor import Deferred
from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear.head import LinearHead
from liger_trainer.kernels.logits.cross_entropy import cross_entropy
from liger_trainer.kernels.logits.loss import LossOptions
from liger_trainer.kernels.runtime import PLAIN

_Tensor = torch.Tensor
WORKSPACE_BYTES = 64 << 20  # of fp32 logits that `per_token` computes at once


def implements(*functions):
    """Register the decorated function as deferred logits' handler for these torch functions."""

    def register(handler):
        for function in functions:
            DeferredLogits.handlers[function] = handler
        return handler

    return register


# --- operations on every logit --------------------------------------------------------------------


def _record(logits, name, argument=None):
    state = logits.state
    if state is None or state.has_log_softmax:
        return NotImplemented
    return derive([logits], state.with_op(name, argument), lambda z: OPS[name](z, argument))


def _cast(logits, dtype):
    if logits.state is None or not dtype.is_floating_point:
        return NotImplemented
    if dtype == logits.dtype:
        return logits
    # The kernels compute the loss of such logits in fp32, which is not what an fp64 cast requests.
    return NotImplemented if dtype == torch.float64 else _record(logits, "cast", dtype)


implements(_Tensor.float)(lambda x: _cast(x, torch.float32))
implements(_Tensor.half)(lambda x: _cast(x, torch.float16))
implements(_Tensor.bfloat16)(lambda x: _cast(x, torch.bfloat16))
implements(_Tensor.double)(lambda x: _cast(x, torch.float64))


@implements(_Tensor.to)
def _to(logits, *args, **kwargs):
    """Handle `.to` with a dtype, and with a device of the same type (as device_map moves outputs).

    Anything else needs the value: logits that are moved to the CPU are meant to be kept.
    """
    wanted = [*args, *(v for k, v in kwargs.items() if k in ("dtype", "device"))]
    if set(kwargs) - {"dtype", "device", "non_blocking"} or not isinstance(logits, DeferredLogits):
        return NotImplemented
    device, dtype = logits.device, logits.dtype
    for argument in wanted:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, (str, int, torch.device)) and not isinstance(argument, bool):
            device = torch.device(argument)
        elif argument is not None:
            return NotImplemented
    if device.type != logits.device.type:
        return NotImplemented
    if device.index not in (None, logits.device.index):
        logits = _move(logits, device)
    return logits if logits is NotImplemented else _cast(logits, dtype)


def _move(logits, device):
    state = logits.state
    if state is None:
        return NotImplemented
    return derive([logits], state.with_op("move", device), lambda z: z.to(device), as_meta(logits))


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


@implements(torch.mul, torch.multiply, _Tensor.mul, _Tensor.multiply, _Tensor.__mul__,
            _Tensor.__rmul__)  # fmt: skip
def _mul(a, b):
    logits, factor = (a, b) if isinstance(a, DeferredLogits) else (b, a)
    return _record(logits, "mul", factor) if _is_number(factor) else NotImplemented


@implements(torch.div, torch.divide, torch.true_divide, _Tensor.div, _Tensor.divide,
            _Tensor.true_divide, _Tensor.__truediv__)  # fmt: skip
def _div(a, b):
    if not isinstance(a, DeferredLogits) or not _is_number(b) or b == 0:
        return NotImplemented
    return _record(a, "div", b)


@implements(torch.tanh, _Tensor.tanh, F.tanh)
def _tanh(logits):
    return _record(logits, "tanh")


@implements(F.log_softmax)
def _functional_log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    return _log_softmax(input, dim, dtype)


@implements(torch.log_softmax, _Tensor.log_softmax)
def _log_softmax(logits, dim=None, dtype=None):
    if dim not in (-1, logits.ndim - 1):
        return NotImplemented
    # autocast computes log_softmax in fp32
    if dtype is None and torch.is_autocast_enabled(logits.device.type):
        dtype = torch.float32
    if dtype is not None:
        logits = _cast(logits, dtype)
        if logits is NotImplemented:
            return NotImplemented
    return _record(logits, "log_softmax")


@implements(torch.add, _Tensor.add, _Tensor.__add__, _Tensor.__radd__)
def _add(a, b):
    if isinstance(a, DeferredLogits) and isinstance(b, DeferredLogits):
        return _add_terms(a, b)
    return _add_bias(a, b) if isinstance(a, DeferredLogits) else _add_bias(b, a)


def _add_bias(logits, bias):
    """Add a constant bias over the vocabulary, as BART does beside its head.

    It must come before any scale or softcap, as the bias of a head does.
    """
    state = logits.state
    if state is None or any(name not in ("cast", "columns") for name, _ in state.ops):
        return NotImplemented
    if type(bias) not in PLAIN or bias.requires_grad or bias.device != logits.device:
        return NotImplemented
    is_vector = bias.numel() == logits.shape[-1] and bias.shape[-1:] == logits.shape[-1:]
    if not is_vector or bias.dim() > logits.dim():
        return NotImplemented
    bias = bias.detach().flatten().clone()  # the original may change before the loss is computed
    like = as_meta(logits) + bias.to("meta")
    if like.dtype not in (logits.dtype, torch.float32):
        return NotImplemented
    return derive([logits], state.with_op("add", bias), lambda z: z + bias, like)


def _add_terms(a, b):
    """Return the sum of two linear maps: a head and the low-rank adapter on it."""
    base, other = a.state, b.state
    if base is None or other is None or base.ops or not _has_dtype_to_add(base, other):
        return NotImplemented
    if a.shape != b.shape or any(name not in ("mul", "div") for name, _ in other.ops):
        return NotImplemented
    scale, _ = as_scale_and_softcap(other.ops)
    terms = (t._replace(scale=t.scale * scale) for t in other.terms)
    if any(getattr(t.layer, "bias", None) is not None for t in other.terms):
        return NotImplemented
    state = dataclasses.replace(base, terms=(*base.terms, *terms))
    return derive([a, b], state, lambda x, y: x + y)


def _has_dtype_to_add(base, other) -> bool:
    """Return whether the GEMMs of `other` may run in the dtype of `base`.

    The terms of an adapter in fp32 may, since a composite head returns logits in that of its base.
    """
    dtype, wide = base.origin.dtype, other.origin.dtype
    recorded = base.origin.scope is other.origin.scope is RECORDED
    return wide == dtype or (recorded and torch.promote_types(wide, dtype) == wide)


# --- consumers ------------------------------------------------------------------------------------


@implements(torch.argmax, _Tensor.argmax)
def _argmax(logits, dim=None, keepdim=False):
    if logits.state is None or dim is None or dim % logits.ndim != logits.ndim - 1:
        return NotImplemented
    ids = per_token(logits, lambda z: z.argmax(-1), torch.long)
    return ids.unsqueeze(-1) if keepdim and ids is not NotImplemented else ids


def per_token(logits, reduce, dtype: torch.dtype):
    """Return `reduce` of each token's logits, without gradient, or NotImplemented.

    Logits are computed for a few tokens at a time, so that metrics do not materialize all of them.
    NotImplemented means that only materialized logits can give the result.
    """
    ops = logits.state.ops
    rows = max(1, WORKSPACE_BYTES // (4 * logits.shape[-1]))

    def fused(head: LinearHead):
        found = [
            reduce(replay(ops, plain_logits(head, slice(start, start + rows))))
            for start in range(0, math.prod(logits.shape[:-1]), rows)
        ]
        empty = torch.empty(0, dtype=dtype, device=logits.device)
        return (torch.cat(found) if found else empty,)

    with torch.no_grad():
        results = consume_logits(logits, fused, lambda z: (reduce(z).flatten(),), with_ops=False)
    return NotImplemented if results is None else results[0].reshape(logits.shape[:-1])


def plain_logits(head: LinearHead, rows: slice = slice(None)) -> torch.Tensor:
    """Return some rows of the logits [N, V], computed as the plain head does."""
    parts, bias = [], head.bias
    for hidden, weight in zip(head.hidden, head.weight, strict=True):
        x = hidden.reshape(-1, hidden.shape[-1])[rows]
        parts.append(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)))
        bias = None
    return functools.reduce(torch.add, parts)


@implements(F.cross_entropy)
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
    dtype = _loss_dtype(input)
    if not state.origin.fused:
        options = LossOptions(ignore_index, label_smoothing)
        loss = cross_entropy(input.materialize(), target, options=options, **kwargs)
        return loss.to(dtype)
    transform = state.transform
    if transform is None:
        return NotImplemented
    options = LossOptions(
        ignore_index, label_smoothing, scale=transform.scale, softcap=transform.softcap
    )

    def fused(head: LinearHead):
        loss = linear_cross_entropy(
            head.hidden, head.weight, target, head.bias,
            options=options, shard=head.shard, **kwargs,
        )  # fmt: skip
        return (loss,)

    def plain(z: torch.Tensor):
        options = LossOptions(ignore_index, label_smoothing)
        return (cross_entropy(z, target, options=options, **kwargs),)

    results = consume_logits(input, fused, plain, shards=True)
    return NotImplemented if results is None else results[0].to(dtype)


def _loss_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype of torch's loss of such logits, which autocast computes in fp32."""
    autocast = torch.is_autocast_enabled(logits.device.type)
    return torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype


@implements(F.nll_loss)
def _nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
              reduction="mean"):  # fmt: skip
    state = input.state if isinstance(input, DeferredLogits) else None
    if state is None or not state.has_log_softmax:
        return NotImplemented
    return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction)
