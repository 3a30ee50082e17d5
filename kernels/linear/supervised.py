"""Find the tokens that have a label, and count them without stalling the device.

Linear cross entropy computes only supervised tokens. Their number is on the device, but the host
needs it to size the GEMMs. Reading it at once would drain the device's queue. So the host first
queues `FIRST_ROWS` rows of work, which need no count, and only then waits: the count arrives while
the device computes those rows, and the rest is queued behind them.
"""

from __future__ import annotations

import dataclasses

import torch

from ..runtime import tl, triton, use_triton

FIRST_ROWS = 1024
"""Rows computed before the number of supervised tokens is known: 1 to 2 ms of work for a large
head, against about 0.1 ms for the count to reach the host."""


@triton.jit
def _partition_kernel(
    labels_ptr, order_ptr, stats_ptr, N, V, ignore_index,
    WRITE_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the indices of supervised tokens from the front, in order, and those of ignored tokens
    from the back; store the counts."""
    supervised = tl.zeros([], tl.int64)
    out_of_range = tl.zeros([], tl.int64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < N
        labels = tl.load(labels_ptr + rows, mask=inside, other=ignore_index)
        keep = (labels != ignore_index) & inside
        rank = tl.cumsum(keep.to(tl.int32), 0)
        if WRITE_ORDER:
            front = supervised + rank - 1
            # The ignored rows before this one already take up the end of the order.
            back = N - 1 - (rows.to(tl.int64) - supervised - rank)
            tl.store(order_ptr + tl.where(keep, front, back), rows.to(tl.int64), mask=inside)
        bad = keep & ((labels < 0) | (labels >= V))
        supervised += tl.sum(keep.to(tl.int64), 0)
        out_of_range += tl.sum(bad.to(tl.int64), 0)
    tl.store(stats_ptr, supervised)
    tl.store(stats_ptr + 1, out_of_range)


def partition(
    labels_N: torch.Tensor, vocab: int, ignore_index: int, want_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order, stats), both int64: a permutation of the tokens with the supervised ones first
    (empty unless wanted); and [supervised tokens, labels outside [0, vocab)], their numbers."""
    n = labels_N.shape[0]
    if use_triton(labels_N):
        order_N = torch.empty(n if want_order else 0, dtype=torch.int64, device=labels_N.device)
        stats = torch.empty(2, dtype=torch.int64, device=labels_N.device)
        _partition_kernel[(1,)](
            labels_N, order_N, stats, n, vocab, ignore_index,
            WRITE_ORDER=want_order, BLOCK=4096 if labels_N.is_cuda else 64, num_warps=16,
        )  # fmt: skip
        return order_N, stats
    keep_N = labels_N != ignore_index
    bad_N = keep_N & ((labels_N < 0) | (labels_N >= vocab))
    stats = torch.stack([keep_N.sum(), bad_N.sum()])
    if not want_order:
        return labels_N.new_empty(0), stats
    return torch.cat([keep_N.nonzero(), (~keep_N).nonzero()]).squeeze(1), stats


class HostStats:
    """The `stats` of `partition`, with what the caller appended, copied to the host asynchronously.

    On a CPU they are available at once. Under CUDA graph capture nothing can be read, and every
    token counts as supervised.
    """

    def __init__(self, stats: torch.Tensor):
        self.stats, self._host, self._event = stats, stats, None
        self._read: list[int] | None = None
        if stats.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._host = None
                return
            self._host = torch.empty(stats.shape, dtype=torch.int64, pin_memory=True)
            self._host.copy_(stats, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self, tokens: int, vocab: int) -> int:
        """Wait for the number of supervised tokens among `tokens`, and return it.

        Raise ValueError if a label lies outside [0, vocab).
        """
        self.check(vocab)
        return tokens if self._host is None else self._numbers()[0]

    def counts(self, number: int) -> list[int]:
        """Wait for the `number` values that the caller appended to the stats, and return them."""
        if self._host is None:
            raise RuntimeError("a loss of groups needs their sizes: not inside a CUDA graph")
        return self._numbers()[2 : 2 + number]

    def _numbers(self) -> list[int]:
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            self._read = self._host.tolist()
        return self._read

    def check(self, vocab: int) -> None:
        """Raise ValueError if a label lies outside [0, vocab)."""
        number = 0 if self._host is None else self._numbers()[1]
        if number:
            raise ValueError(
                f"{number} labels lie outside [0, {vocab}) and are not ignore_index. Is the "
                "tokenizer larger than the model's head? "
                "model.resize_token_embeddings(len(tokenizer)) makes them fit."
            )


@dataclasses.dataclass
class Tokens:
    """The labels of one call, and the order in which their rows are processed."""

    labels: torch.Tensor  # [N]; for a divergence, the mask
    order: torch.Tensor  # [N], supervised tokens first; or [0]: the tokens' own order
    host: HostStats  # how many tokens are supervised
    vocab: int  # labels lie in [0, vocab)

    @classmethod
    def of(cls, labels_N: torch.Tensor, vocab: int, ignore_index: int, first: int) -> Tokens:
        """Return tokens, supervised ones first unless the `first` queued rows hold all of them."""
        order_N, stats = partition(labels_N, vocab, ignore_index, labels_N.shape[0] > first)
        return cls(labels_N, order_N, HostStats(stats), vocab)

    def supervised(self) -> int:
        """Return how many rows to process: if ordered, the supervised tokens, otherwise all."""
        n = self.labels.shape[0]
        return self.host.wait(n, self.vocab) if self.order.numel() else n

    def check(self) -> None:
        """Raise ValueError if a label lies outside [0, vocab)."""
        self.host.check(self.vocab)

    def pick(self, tensor_N: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the rows of `tensor_N` from `start` to `stop`, in processing order."""
        if self.order.numel():
            return tensor_N.index_select(0, self.order[start:stop])
        return tensor_N[start:stop]

    def put(self, out_N: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> None:
        """Write `values` to the rows of `out_N` from `start` to `stop`, in processing order."""
        if self.order.numel():
            out_N.index_copy_(0, self.order[start:stop], values)
        else:
            out_N[start:stop] = values
