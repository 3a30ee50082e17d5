"""The chunk loop of a linear head with a loss: logits a workspace at a time, three GEMMs.

Used by `linear_cross_entropy.py`, which says what it computes and what it costs. Here is how.

Legend: N tokens, V vocabulary, H_t width of term t (one term for a plain head, a second one for a
low-rank adapter on it), g the gradient that backward receives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..logits.cross_entropy import token_loss_
from ..logits.log_probs import score, score_gradient_
from ..logits.loss import LossOptions, accumulate_dtype
from ..logits.reduction import masked_scale, scale_rows
from ..logits.scores import ScoreGradients, ScoreOptions, TokenScores
from .supervised import HostStats
from .workspace import grown, rounded, spans, sum_dtype, workspace


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call must produce, and in which portions; static, free of tensors."""

    want_hidden: tuple[bool, ...]  # d hidden of each term
    want_weight: tuple[bool, ...]  # d weight of each term
    want_bias: bool
    uniform: bool  # g is one number for all tokens, up to the row weights given to forward
    rows: int  # the most rows of logits in the workspace
    first: int  # rows queued before the number of supervised tokens is known; at most `rows`

    @property
    def want_head(self) -> bool:
        return self.want_bias or any(self.want_weight)

    @property
    def want_grad(self) -> bool:
        return self.want_head or any(self.want_hidden)

    def workspace(self, n: int) -> int:
        """Rows of the workspaces that n rows pass through."""
        return workspace(n, self.rows)


@dataclasses.dataclass
class Head:
    """The operands of one call."""

    hidden: list[torch.Tensor]  # [N, H_t] each, all of one dtype, in which the GEMMs run
    weight: list[torch.Tensor]  # [V, H_t] each, of the same dtype
    bias: torch.Tensor | None  # [V]
    labels: torch.Tensor  # [N]
    class_weight: torch.Tensor | None  # [V]
    options: LossOptions | ScoreOptions
    order: torch.Tensor  # [N], supervised tokens first; or [0]: the tokens' own order
    host: HostStats  # how many tokens are supervised

    @property
    def vocab(self) -> int:
        return self.weight[0].shape[0]

    @property
    def classes(self) -> int:
        """What labels are below; more than `vocab` if the weight is one rank's part."""
        return self.vocab

    def rows(self, tensor_N: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if self.order.numel():
            return tensor_N.index_select(0, self.order[start:stop])
        return tensor_N[start:stop]

    def supervised(self) -> int:
        """Rows to do: where the supervised tokens come first their number, else all."""
        n = self.labels.shape[0]
        return self.host.wait(n, self.classes) if self.order.numel() else n

    def store(self, out_N: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> None:
        if self.order.numel():
            out_N.index_copy_(0, self.order[start:stop], values)
        else:
            out_N[start:stop] = values

    def logits_(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Fill `out` [stop - start, V] with the logits of these rows."""
        for t, (hidden, weight) in enumerate(zip(self.hidden, self.weight, strict=True)):
            x = self.rows(hidden, start, stop)
            if t > 0:
                out.addmm_(x, weight.t())
            elif self.bias is not None:
                torch.addmm(self.bias, x, weight.t(), out=out)
            else:
                torch.mm(x, weight.t(), out=out)

    def token_loss_(self, logits: torch.Tensor, start: int, stop: int, want_grad: bool):
        """Fill `logits` [stop - start, V] with the logits of these rows, or with their gradient.

        Returns the loss of each row.
        """
        self.logits_(logits, start, stop)
        labels = self.rows(self.labels, start, stop)
        return token_loss_(logits, labels, self.class_weight, self.options, want_grad)[0]

    def score(self, logits: torch.Tensor, labels: torch.Tensor, wanted: Sequence[str]):
        """`TokenScores` of these rows."""
        return score(logits, labels, self.options, wanted)

    def score_gradient_(self, logits, labels, scores: TokenScores, grads: ScoreGradients) -> None:
        """Overwrite `logits` with their gradient."""
        score_gradient_(logits, labels, scores, grads, self.options)

    def hidden_grad_(self, out_NH: torch.Tensor, dlogits, weight, start: int, stop: int) -> None:
        if self.order.numel():
            self.store(out_NH, torch.mm(dlogits, weight), start, stop)
        else:
            torch.mm(dlogits, weight, out=out_NH[start:stop])


class HeadGradient:
    """d weight and d bias, accumulated over workspaces."""

    def __init__(self, head: Head, plan: Plan, dtypes: Sequence[torch.dtype]):
        self.head, self.plan = head, plan
        self.weight = [
            w.new_empty(w.shape if want else 0, dtype=dtype)
            for w, want, dtype in zip(head.weight, plan.want_weight, dtypes, strict=True)
        ]
        self.bias = head.hidden[0].new_zeros(
            head.vocab if plan.want_bias else 0, dtype=accumulate_dtype(head.hidden[0])
        )
        self._first = True

    def add(self, dlogits: torch.Tensor, start: int, scale_N: torch.Tensor | None) -> None:
        """Add the GEMMs of `dlogits`, the rows from `start` on, each times its scale."""
        stop = start + dlogits.shape[0]
        scale = None if scale_N is None else self.head.rows(scale_N, start, stop)
        for buffer, hidden, want in zip(
            self.weight, self.head.hidden, self.plan.want_weight, strict=True
        ):
            if want:
                x = scale_rows(self.head.rows(hidden, start, stop), scale)
                _add_product_(buffer, dlogits, x, self._first)
        if self.plan.want_bias:
            self.bias += _column_sums(dlogits, scale)
        self._first = False


def _add_product_(buffer: torch.Tensor, dlogits: torch.Tensor, x: torch.Tensor, first: bool):
    """buffer [V, H] = dlogits^T x, or += unless `first`, summed in the precision of `buffer`."""
    beta = 0 if first else 1
    if buffer.dtype == dlogits.dtype:
        torch.addmm(buffer, dlogits.t(), x, beta=beta, out=buffer)
    elif buffer.is_cuda and buffer.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(buffer, dlogits.t(), x, torch.float32, beta=beta, out=buffer)
    elif first:
        buffer.copy_(torch.mm(dlogits.t(), x))
    else:
        buffer += torch.mm(dlogits.t(), x)


def _column_sums(dlogits: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Sum over rows of scale_n * dlogits_n.

    The scale is normalized by its largest magnitude: a common factor is then exact in 16 bits.
    """
    if scale is None:
        return torch.mv(dlogits.t(), dlogits.new_ones(dlogits.shape[0]))
    largest = torch.linalg.vector_norm(scale, float("inf")) if scale.numel() else scale.sum()
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.mv(dlogits.t(), (scale / largest).to(dlogits.dtype)) * largest


@dataclasses.dataclass
class Saved:
    """What forward leaves for backward. A tensor that is not needed has no elements."""

    filled: int  # rows of `dlogits` that hold a gradient
    dlogits: torch.Tensor  # [rows, V], the one workspace
    dbias: torch.Tensor  # [V]
    dhidden: list[torch.Tensor]  # [N, H_t] each, before g
    dweight: list[torch.Tensor]  # [V, H_t] each, summed over workspaces, before g


def forward(
    head: Head,
    row_weight_N: torch.Tensor | None,
    plan: Plan,
    dtypes: Sequence[torch.dtype],
    static: bool = False,
) -> tuple[torch.Tensor, Saved]:
    """Losses [N]; d hidden, and d weight as far as it can be known before g.

    `row_weight_N` multiplies each token's loss (only for a uniform plan: it enters d weight here).
    `dtypes` are the weights' own. The gradient of the logits is kept for backward if one workspace
    held them all; with `static`, where shapes must follow from the inputs', if it could hold all n.
    """
    n = head.labels.shape[0]
    rows = plan.workspace(n)
    logits = head.hidden[0].new_empty((min(n, rows) if static else 0, head.vocab))
    zeros_or_empty = torch.zeros if head.order.numel() else torch.empty  # left-out rows are zero
    loss = zeros_or_empty(n, dtype=accumulate_dtype(head.hidden[0]), device=logits.device)
    dhidden = [
        zeros_or_empty(h.shape if want else 0, dtype=h.dtype, device=h.device)
        for h, want in zip(head.hidden, plan.want_hidden, strict=True)
    ]
    gradient = None

    def finish(start: int, stop: int, keep: bool) -> None:
        """Consume dlogits, the rows from `start` to `stop` of the workspace."""
        nonlocal gradient
        dlogits = logits[: stop - start]
        for out, weight, want in zip(dhidden, head.weight, plan.want_hidden, strict=True):
            if want:
                head.hidden_grad_(out, dlogits, weight, start, stop)
        if plan.want_head and plan.uniform and not keep:
            gradient = gradient or HeadGradient(
                head, plan, [sum_dtype(d, n <= 2 * rows) for d in dtypes]
            )
            gradient.add(dlogits, start, row_weight_N)

    begin = stop = 0
    for start, stop in spans(n, rows, plan.first, head.supervised):
        if start - begin == rows:
            if plan.want_grad:
                finish(begin, start, keep=False)
            begin = start
        if stop - begin > logits.shape[0]:
            size = stop if start == 0 else rounded(head.supervised(), min(n, rows))
            logits = grown(logits, size)
        part = logits[start - begin : stop - begin]
        head.store(loss, head.token_loss_(part, start, stop, plan.want_grad), start, stop)
    kept = plan.want_head and begin == 0 and (n <= rows or not static)
    if plan.want_grad:
        finish(begin, stop, keep=kept)
    return loss, Saved(
        filled=stop if kept else 0,
        dlogits=logits if kept else logits.new_empty((0, head.vocab)),
        dbias=gradient.bias if gradient else logits.new_empty(0),
        dhidden=dhidden,
        dweight=gradient.weight if gradient else [logits.new_empty(0) for _ in head.weight],
    )


def backward(
    head: Head,
    g: torch.Tensor,
    row_weight_N: torch.Tensor | None,
    plan: Plan,
    saved: Saved,
    dtypes: Sequence[torch.dtype],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gradients of hidden, weight (in `dtypes`) and bias; g is a scalar if uniform, else [N].

    Ignored rows get a gradient of exactly 0, also from an infinite or NaN g (a loss that was
    divided by a count of 0).
    """
    n = head.labels.shape[0]
    head.host.check(head.classes)
    supervised = head.labels != head.options.ignore_index
    scale = masked_scale(g if row_weight_N is None else g * row_weight_N, supervised)
    dhidden = [scale_rows(d, scale) if d.numel() else torch.empty_like(d) for d in saved.dhidden]
    if not plan.want_head:
        return dhidden, saved.dweight, saved.dbias
    if saved.dbias.numel() or any(d.numel() for d in saved.dweight):  # summed in forward
        g = masked_scale(g, supervised.any())
        dweight = [
            torch.mul(d, g, out=d.new_empty(d.shape, dtype=dtype))
            for d, dtype in zip(saved.dweight, dtypes, strict=True)
        ]
        return dhidden, dweight, saved.dbias * g
    buffers = dtypes if saved.filled else [sum_dtype(d, n <= 2 * plan.rows) for d in dtypes]
    gradient = HeadGradient(head, plan, buffers)
    if saved.filled or n == 0:
        gradient.add(saved.dlogits[: saved.filled], 0, scale)
    else:
        _recompute(gradient, scale)
    return dhidden, [d.to(t) for d, t in zip(gradient.weight, dtypes, strict=True)], gradient.bias


def _recompute(gradient: HeadGradient, scale_N: torch.Tensor) -> None:
    """d weight where forward knew neither g nor had room for all logits: logits once more."""
    head = gradient.head
    total = head.supervised()
    rows = gradient.plan.workspace(total)
    logits = head.hidden[0].new_empty((min(total, rows), head.vocab))
    for start in range(0, max(total, 1), rows):
        stop = min(start + rows, total)
        head.token_loss_(logits[: stop - start], start, stop, want_grad=True)
        gradient.add(logits[: stop - start], start, scale_N)
