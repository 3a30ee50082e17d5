"""Whether a module is a norm over the last dimension, and the inputs that identify which one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from liger_trainer.injection import probe

_WIDTH_IF_UNKNOWN = 64
_LEADING = {1: (), 2: (5,), 3: (2, 3), 4: (2, 3, 5), 5: (2, 1, 3, 2)}  # dimensions, by rank


def normalized_ranks(
    function: Callable, width: int | None, device: torch.device
) -> tuple[int, ...]:
    """Return the ranks of inputs that `function` normalizes over only the last dimension.

    That is, the result does not depend on the scale of a row, nor on any other row. No ranks are
    returned if `function` does something else to inputs of any rank.
    """
    ranks = []
    for rank, leading in _LEADING.items():
        x = probe.draw((*leading, width or _WIDTH_IF_UNKNOWN), 1.0, device, rank)
        other = x.clone()
        other[(0,) * len(leading)] += 1.0 + x[(0,) * len(leading)].square()
        try:
            with torch.no_grad():
                y, larger, beside = function(x), function(8 * x), function(other)
        except Exception:  # it does not take this rank
            continue
        if not torch.is_tensor(y) or y.shape != x.shape or not y.any():
            return ()
        same_rows = torch.equal(*(t.reshape(-1, t.shape[-1])[1:] for t in (y, beside)))
        if not same_rows or not probe.relative_error(larger, y) < 1e-2:
            return ()
        ranks.append(rank)
    # A module that takes no sequences may look like a norm on single vectors (GroupNorm).
    return tuple(ranks) if max(ranks, default=0) >= 3 else ()


def width_of(module: nn.Module) -> int | None:
    """Return the normalized width from a parameter or `normalized_shape`; None if unknown."""
    for parameter in module.parameters():
        return probe.whole_shape(parameter)[-1]
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


def cases(
    width: int | None,
    ranks: tuple[int, ...],
    parameters: list[nn.Parameter],
    device: torch.device,
    states: int = 1,
) -> Iterator[probe.Case]:
    """Yield inputs (`states` tensors and the parameters) that tell norms apart.

    In fp32: every rank and magnitude, many rows, a row of zeros (only the epsilon counts), and a
    row with a NaN. Then bf16, and bf16 with fp32 parameters, as under autocast.
    """
    rank = 3 if 3 in ranks else ranks[-1]

    def case(label, scale=1.0, rank=rank, dtype=torch.float32, p_dtype=None, rows=None, first=None):
        leading = (*_LEADING[rank][:-1], rows) if rows else _LEADING[rank]
        shape = (*leading, width or (_WIDTH_IF_UNKNOWN if rows is None else 96))
        tensors = [probe.draw(shape, scale, device, i) for i in range(states)]
        if first is not None:
            tensors[0][(0,) * len(leading) + (slice(first[0]),)] = first[1]
        inputs = [t.to(dtype) for t in tensors]
        inputs += [p.detach().to(p_dtype or dtype) for p in parameters]
        optional = p_dtype is not None and p_dtype != dtype
        return probe.Case(tuple(t.requires_grad_() for t in inputs), label, optional)

    for scale in sorted(probe.SCALES, key=lambda scale: scale != 1.0):
        yield case(f"{torch.float32} input of size {scale:g}", scale)
    for each in {*ranks} - {rank}:
        yield case(f"input of rank {each}", rank=each)
    if rank > 1:
        yield case("many rows", rows=131)
    yield case("a row of zeros", first=(None, 0.0))
    yield case("a NaN", first=(1, float("nan")))
    for p_dtype in [torch.bfloat16] + [torch.float32] * bool(parameters):
        for scale in probe.SCALES:
            label = f"{torch.bfloat16} input of size {scale:g}"
            yield case(label, scale, dtype=torch.bfloat16, p_dtype=p_dtype)
