import itertools
import random

import pytest
import torch

from liger_trainer.kernels.linear.workspace import (
    SPLIT_ROWS,
    group_workspace,
    grow_workspace,
    pack_groups,
    round_up_rows,
    spans,
    spans_last_full,
    sum_dtype,
    workspace,
)

CASES = [
    (n, rows, first, total)
    for n, rows, first in itertools.product((0, 1, 5, 8, 9, 40), (1, 3, 8, 16, 64), (0, 1, 3, 8))
    for total in {0, 1, n // 2, n - 1, n}
    if 0 <= total <= n and first <= rows
]


def calls(value):
    """A function that returns `value`, and the list of times that it was called."""
    asked = []

    def count():
        asked.append(None)
        return value

    return count, asked


@pytest.mark.parametrize("walk", [spans, spans_last_full])
def test_every_row_is_covered_once_and_in_order(walk):
    for n, rows, first, total in CASES:
        count, asked = calls(total)
        parts = [part[-2:] for part in walk(n, rows, first, count)]
        queued = min(n, rows, first)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts)][: len(parts)]
        assert (parts[-1][1] if parts else 0) == (total if total > queued else queued)
        assert all(start < stop for start, stop in parts)
        assert len(asked) == (n > queued)


@pytest.mark.parametrize("walk", [spans, spans_last_full])
def test_the_first_part_is_out_before_the_count_is_awaited(walk):
    count, asked = calls(9)
    parts = walk(10, 8, 4, count)
    assert next(parts)[-2:] == (0, 4)
    assert not asked
    next(parts)
    assert asked


def test_spans_fill_workspaces_one_after_the_other():
    for n, rows, first, total in CASES:
        parts = list(spans(n, rows, first, lambda total=total: total))
        for (start, stop), following in itertools.pairwise([*parts, None]):
            assert start // rows == (stop - 1) // rows, "a part lies in one workspace"
            # Only what was queued early, and the end of all rows, may leave one unfilled.
            assert stop % rows == 0 or following is None or stop == min(n, rows, first)


def test_spans_last_full_leaves_the_last_workspace_as_full_as_it_can_be():
    for n, rows, first, total in CASES:
        queued = min(n, rows, first)
        parts = list(spans_last_full(n, rows, first, lambda total=total: total))
        for begin, start, stop in parts:
            assert begin <= start
            assert stop - begin <= rows
        for (begin, _, stop), (next_begin, _, _) in itertools.pairwise(parts):
            assert next_begin in (begin, stop), "a workspace begins where the one before ended"
        if not parts:
            assert total == 0
            continue
        begin, _, stop = parts[-1]
        if total <= rows:
            assert begin == 0, "all that was computed is still there"
        elif total - queued >= rows:
            assert stop - begin == rows
        else:  # the queued rows had begun a workspace before the number of rows was known
            assert begin == queued


@pytest.mark.parametrize("seed", range(20))
def test_pack_takes_whole_units_and_as_many_as_fit(seed):
    random.seed(seed)
    for rows in (1, 4, 10, 100):
        sizes = [random.choice((0, 1, 3, 4, 5, 11)) for _ in range(random.randrange(12))]
        ends = list(itertools.accumulate(sizes))
        unit = row = 0
        for first, last, start, stop in pack_groups(ends, rows):
            assert (first, start) == (unit, row)
            assert last > first
            assert stop - start == sum(sizes[first:last])
            assert stop - start <= rows or last == first + 1
            assert last == len(sizes) or stop + sizes[last] - start > rows, "the next one fitted"
            unit, row = last, stop
        assert (unit, row) == (len(sizes), sum(sizes))


def test_equal_workspaces_within_the_limit():
    counts, limits = (0, 1, 63, 64, 65, 4095, 4096, 30000), (1, 3, 64, 256, 5000, 40000)
    for n, most in itertools.product(counts, limits):
        rows = workspace(n, most)
        assert 1 <= rows <= max(most, 1)
        parts = -(-n // rows)
        assert parts <= -(-n // most)
        assert parts <= 1 or rows == most or rows % 64 == 0


@pytest.mark.parametrize("seed", range(10))
def test_units_are_cut_in_two_where_two_workspaces_hold_them(seed):
    random.seed(seed)
    for most in (1000, 4000, 20000):
        ends = list(itertools.accumulate(random.choice((0, 300, 700, 2500)) for _ in range(9)))
        total = ends[-1]
        rows = group_workspace(ends, most)
        assert 1 <= rows <= most
        halves = min(max(end, total - end) for end in ends)
        if total >= SPLIT_ROWS and halves <= most:
            assert rows == halves
            assert len([1 for *_, begin, stop in pack_groups(ends, rows) if stop > begin]) <= 2
        else:
            assert rows == workspace(total, most)
    assert group_workspace([], 100) == 1


def test_a_grown_workspace_begins_with_what_the_old_one_held():
    logits = torch.randn(3, 7)
    larger = grow_workspace(logits, 5)
    assert larger.shape == (5, 7)
    assert torch.equal(larger[:3], logits)


def test_rounded_holds_all_rows_or_as_many_as_there_may_be():
    assert [round_up_rows(n, 5000) for n in (0, 1, 1024, 1025, 4097)] == [0, 1024, 1024, 2048, 5000]


def test_sums_over_more_than_two_workspaces_are_in_fp32():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert sum_dtype(dtype, at_most_two=True) == dtype
    assert sum_dtype(torch.bfloat16, at_most_two=False) == torch.float32
    assert sum_dtype(torch.float64, at_most_two=False) == torch.float64
    assert {sum_dtype(torch.float16, few) for few in (False, True)} == {torch.float32}
