"""torch functions that select or rearrange the tokens of deferred logits, without their value."""

from __future__ import annotations

import math

import torch

from liger_trainer.deferred.handlers import implements
from liger_trainer.deferred.logits import DeferredLogits, as_meta, derive

_Tensor = torch.Tensor


def _rows(logits, fn, like=None):
    """Apply `fn`, which acts on tokens alone, to hidden states and logits alike."""
    return derive([logits], logits.state.map_hidden(fn), fn, like)


@implements(_Tensor.contiguous)
def _contiguous(logits, memory_format=torch.contiguous_format):
    if logits.state is None or memory_format is not torch.contiguous_format:
        return NotImplemented
    if logits.is_contiguous():
        return logits
    return derive([logits], logits.state, lambda z: z.contiguous())


@implements(_Tensor.clone, torch.clone)
def _clone(logits, memory_format=torch.preserve_format):
    """Stay deferred inside the scope, or in an autograd function's forward.

    Elsewhere, a clone is a snapshot that must not change with the weights.
    """
    state = logits.state
    if state is None or (torch.is_grad_enabled() and not state.origin.scope.open):
        return NotImplemented
    return _adoptable(logits, lambda z: z.clone(memory_format=memory_format))


@implements(_Tensor.detach, torch.detach)
def _detach(logits):
    if logits.state is None:
        return NotImplemented
    if not torch.is_grad_enabled():
        return _adoptable(logits, lambda z: z.view_as(z))
    with torch.no_grad():
        return derive([logits], logits.state, lambda z: z.detach())


@implements(_Tensor.data.__get__, _Tensor.numpy)
def _expose(logits, *args, **kwargs):
    """Record that writes are possible that no version counter records."""
    if isinstance(logits, DeferredLogits):
        logits._base_logits()._is_exposed = True
    return NotImplemented


def _adoptable(logits, copy):
    """Return a copy that an autograd function can return as its output (an engine's identity, say).

    Its gradient then passes through that function; otherwise it has none.
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
    """Handle `unbind`, which also serves iteration over logits."""
    return _pieces(logits, lambda x: x.unbind(dim), dim)


def _pieces(logits, cut, dim):
    if logits.state is None or dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    count = len(cut(as_meta(logits)))
    return tuple(_rows(logits, lambda x, i=i: cut(x)[i]) for i in range(count))


@implements(_Tensor.__getitem__)
def _getitem(logits, index):
    if logits.state is None:
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if not _leaves_vocabulary(index, logits.ndim):
        return _columns(logits, parts)
    if all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts):
        return _rows(logits, lambda x: x[index])
    # Advanced indexing copies; its shape may depend on values, so it is taken from hidden states.
    hidden = logits.state.terms[0].hidden[index]
    shape = (*hidden.shape[:-1], logits.shape[-1])
    like = torch.empty(shape, dtype=logits.dtype, device="meta")
    return derive([logits], logits.state.map_hidden(lambda x: x[index]), lambda z: z[index], like)


def _columns(logits, parts):
    """Handle `[..., a:b]`, which leaves a padded vocabulary's last entries out (Inkling 2)."""
    state, last = logits.state, parts[-1]
    if len(parts) != 2 or parts[0] is not Ellipsis or state.has_log_softmax:
        return NotImplemented
    if not isinstance(last, slice) or last.step not in (None, 1):
        return NotImplemented
    if any(not isinstance(bound, int | None) for bound in (last.start, last.stop)):
        return NotImplemented
    if not range(logits.shape[-1])[last]:
        return NotImplemented
    return derive([logits], state.with_op("columns", last), lambda z: z[..., last])


def _leaves_vocabulary(index, ndim: int) -> bool:
    """Return whether `index` selects only tokens, each with its whole vocabulary."""
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
