"""The functions of torch that deferred logits implement without their value."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from liger_trainer.deferred.head_call import Operands
from liger_trainer.deferred.logits import (
    OPS,
    DeferredLogits,
    as_meta,
    as_scale_and_softcap,
    consume_logits,
    derive,
    replay,
)
from liger_trainer.deferred.tensor import Deferred, as_wrapper
from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy
from liger_trainer.kernels.logits.cross_entropy import cross_entropy
from liger_trainer.kernels.logits.loss import LossOptions

_Tensor = torch.Tensor
WORKSPACE_BYTES = 64 << 20  # of fp32 logits that exist at once


def implements(*functions):
    """Register a handler of deferred logits for these functions of torch."""

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
    return derive([logits], state.then(name, argument), lambda z: OPS[name](z, argument))


def _cast(logits, dtype):
    if logits.state is None or not dtype.is_floating_point:
        return NotImplemented
    return logits if dtype == logits.dtype else _record(logits, "cast", dtype)


implements(_Tensor.float)(lambda x: _cast(x, torch.float32))
implements(_Tensor.half)(lambda x: _cast(x, torch.float16))
implements(_Tensor.bfloat16)(lambda x: _cast(x, torch.bfloat16))
implements(_Tensor.double)(lambda x: _cast(x, torch.float64))


@implements(_Tensor.to)
def _to(logits, *args, **kwargs):
    """`.to` with a dtype, and a device of the same kind, as device_map does with what a model
    returns. Anything else needs the value: logits that are moved to the CPU are to be kept."""
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
    return derive([logits], state.then("move", device), lambda z: z.to(device), as_meta(logits))


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
    """The sum of two linear maps: a head and the low-rank adapter on it."""
    if not (isinstance(a, DeferredLogits) and isinstance(b, DeferredLogits)):
        return NotImplemented
    base, other = a.state, b.state
    if base is None or other is None or base.ops or base.origin.dtype != other.origin.dtype:
        return NotImplemented
    if a.shape != b.shape or any(name not in ("mul", "div") for name, _ in other.ops):
        return NotImplemented
    scale, _ = as_scale_and_softcap(other.ops)
    terms = (t._replace(scale=t.scale * scale) for t in other.terms)
    if any(getattr(t.layer, "bias", None) is not None for t in other.terms):
        return NotImplemented
    state = base.__class__(base.origin, (*base.terms, *terms))
    return derive([a, b], state, lambda x, y: x + y)


def _in_place(functional):
    """x op= c is recorded, unless a view of x would miss it: then the value is changed."""

    def handler(logits, *args):
        if not isinstance(logits, DeferredLogits) or logits.state is None or logits._has_views:
            return NotImplemented
        before = derive([logits], logits.state, lambda z: z)
        before._parents, before._from_parents = logits._parents, logits._from_parents
        result = functional(before, *args)
        if result is NotImplemented or result.dtype != logits.dtype:
            return NotImplemented
        logits._replaced_by = result
        return result

    return handler


implements(_Tensor.mul_, _Tensor.multiply_, _Tensor.__imul__)(_in_place(_mul))
implements(_Tensor.div_, _Tensor.divide_, _Tensor.__itruediv__)(_in_place(_div))
implements(torch.tanh_, _Tensor.tanh_)(_in_place(_tanh))


# --- the same logits of other tokens --------------------------------------------------------------


def _rows(logits, fn, like=None):
    """`fn` acts on the tokens of hidden states and logits alike."""
    made = derive([logits], logits.state.map_hidden(fn), fn, like)
    made._has_views = logits._has_views = True
    return made


@implements(_Tensor.contiguous)
def _contiguous(logits, memory_format=torch.contiguous_format):
    if logits.state is None or memory_format is not torch.contiguous_format:
        return NotImplemented
    if logits.is_contiguous():
        return logits
    return derive([logits], logits.state, lambda z: z.contiguous())


@implements(_Tensor.clone, torch.clone)
def _clone(logits, memory_format=torch.preserve_format):
    """Within the scope, or inside an autograd function's forward. Elsewhere it is a snapshot."""
    state = logits.state
    if state is None or (torch.is_grad_enabled() and not state.origin.scope.open):
        return NotImplemented
    return _adoptable(logits, lambda z: z.clone(memory_format=memory_format))


@implements(_Tensor.detach, torch.detach)
def _detach(logits):
    if logits.state is None:
        return NotImplemented
    logits._has_views = True
    if not torch.is_grad_enabled():
        made = _adoptable(logits, lambda z: z.view_as(z))
    else:
        with torch.no_grad():
            made = derive([logits], logits.state, lambda z: z.detach())
    made._has_views = True
    return made


def _adoptable(logits, copy):
    """A copy that an autograd function may return as its own (an engine's identity, say).

    Its gradient then passes through that function; without one, it has none.
    """
    made = derive([logits], logits.state, copy)
    made._with_grad = logits._with_grad
    return made


@implements(_Tensor.view, _Tensor.reshape, torch.reshape)
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
    return _rows(logits, lambda x: x.reshape(*shape[:-1], x.shape[-1]))


@implements(_Tensor.flatten, torch.flatten)
def _flatten(logits, start_dim=0, end_dim=-1):
    end = end_dim % logits.ndim
    if logits.state is None or end == logits.ndim - 1:
        return NotImplemented
    return _rows(logits, lambda x: x.flatten(start_dim % logits.ndim, end))


@implements(_Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(logits, dim):
    if logits.state is None or dim == -1 or dim >= logits.ndim:
        return NotImplemented
    return _rows(logits, lambda x: x.unsqueeze(dim))


@implements(_Tensor.squeeze, torch.squeeze)
def _squeeze(logits, dim=None):
    if logits.state is None or not isinstance(dim, int) or dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    return _rows(logits, lambda x: x.squeeze(dim))


@implements(torch.chunk, _Tensor.chunk)
def _chunk(logits, chunks, dim=0):
    return _pieces(logits, lambda x: x.chunk(chunks, dim), dim)


@implements(torch.split, _Tensor.split)
def _split(logits, split_size, dim=0):
    return _pieces(logits, lambda x: x.split(split_size, dim), dim)


@implements(torch.unbind, _Tensor.unbind)
def _unbind(logits, dim=0):
    """Also what iterates over logits."""
    return _pieces(logits, lambda x: x.unbind(dim), dim)


def _pieces(logits, cut, dim):
    if logits.state is None or dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    count = len(cut(as_meta(logits)))
    return tuple(_rows(logits, lambda x, i=i: cut(x)[i]) for i in range(count))


@implements(_Tensor.__getitem__)
def _getitem(logits, index):
    if logits.state is None or not _leaves_vocabulary(index, logits.ndim):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts):
        return _rows(logits, lambda x: x[index])
    # Advanced indexing makes a copy; its shape may depend on values, so it is read off the hidden
    # states.
    hidden = logits.state.terms[0].hidden[index]
    shape = (*hidden.shape[:-1], logits.shape[-1])
    like = torch.empty(shape, dtype=logits.dtype, device="meta")
    return derive([logits], logits.state.map_hidden(lambda x: x[index]), lambda z: z[index], like)


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


# --- consumers ------------------------------------------------------------------------------------


@implements(torch.argmax, _Tensor.argmax)
def _argmax(logits, dim=None, keepdim=False):
    if logits.state is None or dim is None or dim % logits.ndim != logits.ndim - 1:
        return NotImplemented
    ids = per_token(logits, lambda z: z.argmax(-1), torch.long)
    return ids.unsqueeze(-1) if keepdim and ids is not NotImplemented else ids


def per_token(logits, reduce, dtype: torch.dtype):
    """Return `reduce` of each token's logits, without gradient; NotImplemented if that needs all.

    Some tokens are computed at a time, so that metrics need no full logits.
    """
    ops = logits.state.ops
    rows = max(1, WORKSPACE_BYTES // (4 * logits.shape[-1]))

    def fused(operands: list[Operands]):
        found = [
            reduce(replay(ops, plain_logits(operands, slice(start, start + rows))))
            for start in range(0, math.prod(logits.shape[:-1]), rows)
        ]
        empty = torch.empty(0, dtype=dtype, device=logits.device)
        return (torch.cat(found) if found else empty,)

    with torch.no_grad():
        results = consume_logits(logits, fused, lambda z: (reduce(z).flatten(),))
    return NotImplemented if results is None else results[0].reshape(logits.shape[:-1])


def plain_logits(operands: list[Operands], rows: slice = slice(None)) -> torch.Tensor:
    """Some rows of the logits [N, V], by the operations of the plain head."""
    value = None
    for hidden, weight, bias, _ in operands:
        x = hidden.reshape(-1, hidden.shape[-1])[rows]
        part = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        value = part if value is None else value + part
    return value


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
    if state.transform is None:
        return NotImplemented
    options = LossOptions(ignore_index, label_smoothing, 0.0, *state.transform)

    def fused(operands: list[Operands]):
        hidden, weights, biases, shards = zip(*operands, strict=True)
        loss = linear_cross_entropy(
            list(hidden), list(weights), target, biases[0],
            options=options, shard=shards[0], **kwargs,
        )  # fmt: skip
        return (loss,)

    def plain(z: torch.Tensor):
        options = LossOptions(ignore_index, label_smoothing)
        return (cross_entropy(z, target, options=options, **kwargs),)

    results = consume_logits(input, fused, plain, shards=True)
    return NotImplemented if results is None else results[0].to(dtype)


def _loss_dtype(logits: torch.Tensor) -> torch.dtype:
    """The dtype in which torch returns a loss of such logits: autocast computes it in fp32."""
    autocast = torch.is_autocast_enabled(logits.device.type)
    return torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype


@implements(F.nll_loss)
def _nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
              reduction="mean"):  # fmt: skip
    state = input.state if isinstance(input, DeferredLogits) else None
    if state is None or not state.has_log_softmax:
        return NotImplemented
    return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction)


# --- gradients of the logits ----------------------------------------------------------------------


def _separate_value(logits) -> torch.Tensor | None:
    """The value of the logits, if gradients of it do not pass through the logits themselves."""
    direct = getattr(logits, "_direct", None)
    return direct if direct is not None and direct is logits._value else None


@implements(_Tensor.register_hook)
def _register_hook(logits, hook):
    value = _separate_value(logits)
    if value is not None and value.requires_grad:
        value.register_hook(hook)
    return as_wrapper(_Tensor.register_hook, logits, hook)


@implements(_Tensor.retain_grad)
def _retain_grad(logits):
    value = _separate_value(logits)
    if value is not None and value.requires_grad:
        value.retain_grad()
    as_wrapper(_Tensor.retain_grad, logits)


@implements(_Tensor.grad.__get__)
def _grad(logits, *owner):
    value = _separate_value(logits)
    parts = [as_wrapper(_Tensor.grad.__get__, logits)]
    parts.append(value.grad if value is not None and value.retains_grad else None)
    return _sum([p for p in parts if p is not None])


def _sum(parts):
    plain = [p.materialize() if isinstance(p, Deferred) else p for p in parts]
    return sum(plain[1:], plain[0]) if plain else None


@implements(torch.autograd.grad)
def _autograd_grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False,
                   only_inputs=True, allow_unused=None, is_grads_batched=False,
                   materialize_grads=False):  # fmt: skip
    """Gradients with respect to logits, that came to them fused and through their value."""
    wanted = [inputs] if torch.is_tensor(inputs) else list(inputs)
    places: list[list] = []
    for x in wanted:
        if isinstance(x, Deferred):
            places.append([torch.autograd.graph.get_gradient_edge(x)])
            value = _separate_value(x)
            places[-1] += [value] if value is not None and value.requires_grad else []
        else:
            places.append([x])
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    found = iter(
        torch.autograd.grad(
            [x.materialize() if isinstance(x, Deferred) else x for x in outputs],
            [x for place in places for x in place],
            grad_outputs=grad_outputs,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )
    )
    grads = []
    for place in places:
        parts = [next(found) for _ in place]
        grads.append(_sum([g for g in parts if g is not None]))
    if materialize_grads:
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)
        ]
    elif not allow_unused and any(g is None for g in grads):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return tuple(grads)
