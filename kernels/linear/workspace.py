"""Choose how many rows of logits exist at once, and in which order rows are processed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

CPU_MEMORY = 16 << 30
"""The memory that a CPU is assumed to have: its workspace is 256 MiB."""

SPLIT_ROWS = 4096
"""With at least this many rows, two workspaces of half the size take only a few percent longer."""


def workspace_rows(
    tokens: int, vocab: int, trainable_width: int, hidden: torch.Tensor, workspaces: int = 1
) -> int:
    """Return the maximum rows of logits to hold on the device of `hidden`; see `rows_on`."""
    if hidden.is_cuda:
        memory = torch.cuda.get_device_properties(hidden.device).total_memory
    else:
        memory = CPU_MEMORY
    return rows_on(memory, tokens, vocab, trainable_width, hidden.element_size(), workspaces)


def rows_on(
    memory: int, tokens: int, vocab: int, trainable_width: int, itemsize: int, workspaces: int = 1
) -> int:
    """Return the maximum rows of logits to hold at once on a device of `memory` bytes.

    The budget is 1/64 of the memory; without d weight a quarter of that, because large workspaces
    only make the summation of d weight cheaper. A workspace may also take the memory of the fp32
    buffer for d weight, if all tokens then fit `workspaces` such workspaces: that many need no
    buffer.

    The result depends on `tokens` only through one comparison, so that compiled code serves every
    number of tokens on the same side of it.
    """
    budget = memory // 64
    if not trainable_width:
        budget //= 4
    row = vocab * itemsize
    without_buffer = (budget + vocab * trainable_width * 4) // row
    return without_buffer if tokens <= workspaces * without_buffer else max(256, budget // row)


def workspace(n: int, most: int) -> int:
    """Return how many rows, at most `most`, each workspace gets so that n rows fill them evenly."""
    if n <= most:
        return max(n, 1)
    return min(most, math.ceil(n / math.ceil(n / most) / 64) * 64)


def group_workspace(ends: list[int], most: int) -> int:
    """Return the rows of a workspace for groups that end at `ends`.

    Like `workspace`, but prefer two workspaces of about half the size that split no group.
    """
    total = ends[-1] if ends else 0
    if total >= SPLIT_ROWS:
        halves = min(max(end, total - end) for end in ends)
        if halves <= most:
            return halves
    return workspace(total, most)


def sum_dtype(dtype: torch.dtype, at_most_two: bool) -> torch.dtype:
    """Return the dtype in which d weight is summed over workspaces, `at_most_two` or more.

    The sum of two is rounded once in between, by no more than the final rounding, so the gradient
    itself is the buffer. More are summed in fp32. fp16 always is: before the division by the number
    of tokens, a sum can exceed its range.
    """
    in_place = at_most_two and dtype != torch.float16
    return dtype if in_place else torch.promote_types(dtype, torch.float32)


def grow_workspace(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a workspace of `rows` rows that begins with a copy of `logits`.

    Needed because the first rows are queued before the host knows how many follow.
    """
    larger = logits.new_empty((rows, logits.shape[1]))
    if logits.shape[0]:
        larger[: logits.shape[0]] = logits
    return larger


def round_up_rows(total: int, most: int) -> int:
    """Return `total` rounded up to 1024, at most `most`, so that the allocator reuses blocks."""
    return min(math.ceil(total / 1024) * 1024, most)


def spans(n: int, rows: int, first: int, count: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the parts that make up the workspaces of `rows` rows.

    The first part, of `first` rows, comes before `count()` waits for the number of rows to process.
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
    """Yield (begin, start, stop) of parts such that the last workspace is as full as possible.

    The rows from `start` to `stop` lie in a workspace that begins at row `begin`. Rows that do not
    fit the last workspace come first. `first` and `count` are as in `spans`.
    """
    begin = start = 0
    stop = min(n, rows, first)
    if stop:
        yield begin, start, stop
    total = count() if n > stop else stop
    if total > rows:  # the queued rows then fill a workspace by themselves
        rest = (total - stop) % rows
        begin = stop
        if rest:
            yield begin, stop, stop + rest
            begin = stop = stop + rest
    while stop < total:
        start, stop = stop, min(total, begin + rows)
        yield begin, start, stop
        begin = stop if stop < total else begin


def pack_groups(ends: list[int], rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first group, group after the last, first row, row after the last).

    Each range holds as many whole groups as fit `rows` rows, but at least one. Group i covers the
    rows from ends[i - 1] to ends[i].
    """
    first, start = 0, 0
    while first < len(ends):
        last = first + 1
        while last < len(ends) and ends[last] - start <= rows:
            last += 1
        yield first, last, start, ends[last - 1]
        first, start = last, ends[last - 1]
