"""Choose how many rows of logits exist at once, and in which order rows are processed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

CPU_MEMORY = 16 << 30
"""What a CPU is taken to have: its workspace is 256 MiB."""

SPLIT_ROWS = 4096
"""From so many rows on, two workspaces of half the size cost a few percent of time at most."""


def workspace_rows(
    tokens: int, vocab: int, trainable_width: int, hidden: torch.Tensor, workspaces: int = 1
) -> int:
    """Return the most rows of logits to hold at once on the device of `hidden`, see `rows_on`."""
    if hidden.is_cuda:
        memory = torch.cuda.get_device_properties(hidden.device).total_memory
    else:
        memory = CPU_MEMORY
    return rows_on(memory, tokens, vocab, trainable_width, hidden.element_size(), workspaces)


def rows_on(
    memory: int, tokens: int, vocab: int, trainable_width: int, itemsize: int, workspaces: int = 1
) -> int:
    """Return the most rows of logits to hold at once on a device of `memory` bytes.

    What the budget holds: 1/64 of the memory; a quarter of it if there is no d weight, whose
    summation is what large workspaces are for. If all tokens fit `workspaces` of the budget and the
    fp32 buffer for d weight together, they may have both: the buffer is then unnecessary.

    The answer depends on `tokens` through one comparison only, so that compiled code serves every
    number of tokens on the same side of it.
    """
    budget = memory // 64
    if not trainable_width:
        budget //= 4
    row = vocab * itemsize
    without_buffer = (budget + vocab * trainable_width * 4) // row
    return without_buffer if tokens <= workspaces * without_buffer else max(256, budget // row)


def workspace(n: int, most: int) -> int:
    """Rows of a workspace of at most `most` rows, such that n rows make equal ones."""
    if n <= most:
        return max(n, 1)
    return min(most, math.ceil(n / math.ceil(n / most) / 64) * 64)


def unit_rows(ends: list[int], most: int) -> int:
    """Like `workspace`, but never split a group; prefer two half-size chunks."""
    total = ends[-1] if ends else 0
    if total >= SPLIT_ROWS:
        halves = min(max(end, total - end) for end in ends)
        if halves <= most:
            return halves
    return workspace(total, most)


def sum_dtype(dtype: torch.dtype, few: bool) -> torch.dtype:
    """Return the accumulation dtype of d weight; `few`: over at most two workspaces.

    Two need one rounding between them, no larger than the last one; so the gradient itself is the
    buffer. More are summed in fp32, and so is fp16, whose range a sum before its division by the
    number of tokens would leave.
    """
    return dtype if few and dtype != torch.float16 else torch.promote_types(dtype, torch.float32)


def grown(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a workspace of `rows` rows that begins with what `logits` holds.

    The first rows are queued before the host knows how many will follow.
    """
    larger = logits.new_empty((rows, logits.shape[1]))
    if logits.shape[0]:
        larger[: logits.shape[0]] = logits
    return larger


def rounded(total: int, most: int) -> int:
    """Rows to allocate for `total`: a multiple of 1024, so that the allocator finds them again."""
    return min(math.ceil(total / 1024) * 1024, most)


def spans(n: int, rows: int, first: int, count: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts that make up the workspaces of `rows` rows.

    The part of `first` rows is queued before `count()`, the number of rows to do, is awaited.
    """
    start, stop = 0, min(n, rows, first)
    if stop:
        yield start, stop
    total = count() if n > stop else stop
    while stop < total:
        start, stop = stop, min(total, stop + rows - stop % rows)
        yield start, stop


def spans_last_full(
    n: int, rows: int, first: int, count: Callable[[], int]
) -> Iterator[tuple[int, int, int]]:
    """(begin, start, stop) of parts such that the workspace ends as full as it can be.

    The part from `start` to `stop` lies in a workspace that begins at row `begin`. What does not
    fit the last workspace comes first. `first` and `count` as in `spans`.
    """
    begin = start = 0
    stop = min(n, rows, first)
    if stop:
        yield begin, start, stop
    total = count() if n > stop else stop
    if total > rows:  # the queued rows were a part of their own
        rest = (total - stop) % rows
        begin = stop
        if rest:
            yield begin, stop, stop + rest
            begin = stop = stop + rest
    while stop < total:
        start, stop = stop, min(total, begin + rows)
        yield begin, start, stop
        begin = stop if stop < total else begin


def pack(ends: list[int], rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(first unit, unit after the last, first row, row after the last): as many whole units as fit
    `rows` rows, at least one. Unit i covers the rows from ends[i - 1] to ends[i]."""
    unit, start = 0, 0
    while unit < len(ends):
        last = unit + 1
        while last < len(ends) and ends[last] - start <= rows:
            last += 1
        yield unit, last, start, ends[last - 1]
        unit, start = last, ends[last - 1]
