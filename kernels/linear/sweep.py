"""The chunk loop of a linear head: logits a workspace at a time, and three GEMMs.

A step turns logits into values for each token and, if possible, into their own gradient in place.
Each operation has its own step: `cross_entropy.py`, `divergence.py`, and `scoring.py` for
log-probabilities.

Legend: N tokens, V vocabulary, H_t width of term t, g the gradient that backward receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..logits.reduction import masked_scale, scale_rows
from ..logits.transform import accumulate_dtype
from ..runtime import without_autocast
from .head import LinearHead, Plan, split
from .supervised import Tokens
from .workspace import grow_workspace, round_up_rows, spans, spans_last_full, sum_dtype

Step = Callable[[torch.Tensor, int, int], None]
"""step(logits, start, stop): process the logits of these rows, a view of the workspace."""


class Sweep:
    """A head, its tokens, its workspace of logits, and its gradients so far (not scaled by g)."""

    def __init__(self, head: LinearHead, tokens: Tokens, plan: Plan, logits=None):
        self.head, self.dtypes = head.cast(), head.dtypes
        self.sum_dtypes = self.dtypes  # those in which d weight is summed
        self.tokens, self.plan = tokens, plan
        self.logits = self.new_logits(0) if logits is None else logits  # [rows, V]
        self.dhidden: list[torch.Tensor | None] = [None] * len(head.hidden)
        self.dweight: list[torch.Tensor | None] = [None] * len(head.weight)
        self.dbias: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the present workspace, or 1."""
        return max(self.logits.shape[0], 1)

    def new_logits(self, rows: int) -> torch.Tensor:
        return self.head.hidden[0].new_empty((rows, self.head.rows))

    def make_room(self, rows: int) -> None:
        if rows > self.logits.shape[0]:
            self.logits = grow_workspace(self.logits, rows)

    def fill_(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Fill `out` [stop - start, V] with the logits of these rows."""
        head = self.head
        for t, (hidden, weight) in enumerate(zip(head.hidden, head.weight, strict=True)):
            x = self.tokens.pick(hidden, start, stop)
            if t > 0:
                out.addmm_(x, weight.t())
            elif head.bias is not None:
                torch.addmm(head.bias, x, weight.t(), out=out)
            else:
                torch.mm(x, weight.t(), out=out)

    def workspaces(
        self, step: Step, rows: int, last_full: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Run `step` on all rows, and yield the range (begin, stop) of each finished workspace.

        `self.logits[: stop - begin]` then holds what the step made of the logits. The last range
        is empty if no token is supervised; with `last_full` it is as full as possible.
        """
        n = self.tokens.labels.shape[0]
        limits = n, rows, self.plan.first, self.tokens.supervised
        parts = spans_last_full(*limits) if last_full else (
            (start - start % rows, start, stop) for start, stop in spans(*limits)
        )  # fmt: skip
        begin = stop = 0
        for new_begin, start, new_stop in parts:
            if new_begin > begin:
                yield begin, stop
            begin, stop = new_begin, new_stop
            if stop - begin > self.logits.shape[0]:
                self.make_room(
                    stop if start == 0 else round_up_rows(self.tokens.supervised(), min(n, rows))
                )
            part = self.logits[start - begin : stop - begin]
            self.fill_(part, start, stop)
            step(part, start, stop)
        yield begin, stop

    def recompute(
        self, start: int, stop: int, step: Step | None = None
    ) -> Iterator[tuple[int, int]]:
        """Compute the logits of these rows in the present workspace, and yield as `workspaces`."""
        for begin in range(start, stop, self.rows):
            end = min(begin + self.rows, stop)
            part = self.logits[: end - begin]
            self.fill_(part, begin, end)
            if step is not None:
                step(part, begin, end)
            yield begin, end

    def choose_sum_dtypes(self, at_most_two: bool) -> None:
        """Choose the dtypes in which d weight is summed over workspaces, `at_most_two` or more."""
        self.sum_dtypes = [sum_dtype(dtype, at_most_two) for dtype in self.dtypes]

    def add_hidden(self, begin: int, stop: int) -> None:
        """Compute d hidden of the rows whose dlogits the workspace holds; ignored rows are zero."""
        dlogits, ordered = self.logits[: stop - begin], self.tokens.order.numel() > 0
        for t, (hidden, weight) in enumerate(zip(self.head.hidden, self.head.weight, strict=True)):
            if not self.plan.want_hidden[t]:
                continue
            out = self.dhidden[t]
            if out is None:
                new = hidden.new_zeros if ordered else hidden.new_empty
                out = self.dhidden[t] = new(hidden.shape)
            with without_autocast(dlogits):
                if ordered:
                    self.tokens.put(out, torch.mm(dlogits, weight), begin, stop)
                else:
                    torch.mm(dlogits, weight, out=out[begin:stop])

    def add_head(self, begin: int, stop: int, scale_N: torch.Tensor | None = None) -> None:
        """Add d weight and d bias of these rows, each row multiplied by its `scale_N`."""
        dlogits = self.logits[: stop - begin]
        scale = None if scale_N is None else self.tokens.pick(scale_N, begin, stop)
        for t, (hidden, weight) in enumerate(zip(self.head.hidden, self.head.weight, strict=True)):
            if not self.plan.want_weight[t]:
                continue
            first = self.dweight[t] is None
            if first:
                self.dweight[t] = weight.new_empty(weight.shape, dtype=self.sum_dtypes[t])
            x = scale_rows(self.tokens.pick(hidden, begin, stop), scale)
            with without_autocast(x):
                _add_product_(self.dweight[t], dlogits, x, first)
        if self.plan.want_bias:
            if self.dbias is None:
                dtype = accumulate_dtype(dlogits)
                self.dbias = dlogits.new_zeros(self.head.rows, dtype=dtype)
            with without_autocast(dlogits):
                self.dbias += _column_sums(dlogits, scale)

    def flat_gradients(self) -> tuple[torch.Tensor, ...]:
        """Return (d bias, *d hidden, *d weight); missing ones have no elements."""
        grads = self.dbias, *self.dhidden, *self.dweight
        return tuple(self.logits.new_empty(0) if d is None else d for d in grads)

    def gradients(self):
        """Return (d hidden, d weight in the dtypes of the weights, d bias); missing ones have no
        elements."""
        dbias, dhidden, dweight = split(self.flat_gradients())
        return dhidden, [d.to(t) for d, t in zip(dweight, self.dtypes, strict=True)], dbias


def _add_product_(buffer: torch.Tensor, dlogits: torch.Tensor, x: torch.Tensor, first: bool):
    """Add dlogits^T x to buffer [V, H], or overwrite it if `first`; sums in the buffer's dtype."""
    beta = 0 if first else 1
    if buffer.dtype == dlogits.dtype:
        torch.addmm(buffer, dlogits.t(), x, beta=beta, out=buffer)
    elif buffer.is_cuda and buffer.dtype == torch.float32 and dlogits.element_size() == 2:
        torch.ops.aten.addmm.dtype_out(buffer, dlogits.t(), x, torch.float32, beta=beta, out=buffer)
    elif first:
        buffer.copy_(torch.mm(dlogits.t(), x))
    else:
        buffer += torch.mm(dlogits.t(), x)


def _column_sums(dlogits: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over rows of scale_n * dlogits_n.

    The scale is divided by its largest magnitude, so that a common factor is exact in 16 bits.
    """
    if scale is None:
        return torch.mv(dlogits.t(), dlogits.new_ones(dlogits.shape[0]))
    largest = torch.linalg.vector_norm(scale, float("inf")) if scale.numel() else scale.sum()
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.mv(dlogits.t(), (scale / largest).to(dlogits.dtype)) * largest


def scale_gradients(
    grads: Sequence[torch.Tensor], g: torch.Tensor, supervised_N: torch.Tensor,
    dtypes: Sequence[torch.dtype], scale_N: torch.Tensor | None = None,
):  # fmt: skip
    """Return (d hidden, d weight in `dtypes`, d bias): `Sweep.flat_gradients` multiplied by g.

    The rows of d hidden are multiplied by `scale_N`, which defaults to g, and to 0 for ignored
    rows. d weight and d bias, if they have elements, are multiplied by g, which is then a scalar.
    If all rows are ignored they are 0, whatever g is.
    """
    dbias, dhidden, dweight = split(grads)
    scale_N = masked_scale(g, supervised_N) if scale_N is None else scale_N
    dhidden = [scale_rows(d, scale_N) if d.numel() else torch.empty_like(d) for d in dhidden]
    if dbias.numel() or any(d.numel() for d in dweight):
        g = masked_scale(g, supervised_N.any())
        dbias = dbias * g
        dweight = [
            torch.mul(d, g, out=torch.empty_like(d, dtype=dtype))
            for d, dtype in zip(dweight, dtypes, strict=True)
        ]
    return dhidden, dweight, dbias
