"""The chunk loops of a linear head whose tokens are scored: log-probabilities and their gradient.

Two ways to a gradient, both used by `linear_log_probs.py` and `linear_log_prob_loss.py`, which say
what they compute and cost:

- `forward` and `backward`: the caller computes the loss, and its gradient arrives in backward. The
  last workspace of logits is kept until then; what did not fit it is computed again.
- `forward_with_gradient`: the gradient of the loss in the scores of some rows is known as soon as
  their scores are. It is used at once, and nothing is computed twice.

Legend: N tokens, V vocabulary, H_t width of term t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ..logits.loss import accumulate_dtype
from ..logits.scores import ScoreGradients, TokenScores
from .head import Head, HeadGradient, Plan
from .workspace import (
    grown,
    pack,
    rounded,
    spans_last_full,
    sum_dtype,
    unit_rows,
)


class Scoring:
    """One head, its workspace of logits, the scores of all tokens and the gradients so far."""

    def __init__(self, head: Head, plan: Plan, logits: torch.Tensor, scores: TokenScores):
        self.head, self.plan, self.logits, self.scores = head, plan, logits, scores
        self.dhidden: list[torch.Tensor] = []
        self.gradient: HeadGradient | None = None

    @classmethod
    def start(cls, head: Head, plan: Plan, outputs: Sequence[str]) -> Scoring:
        """With no workspace yet, and the scores of tokens without label: zeros."""
        n, like = head.labels.shape[0], head.hidden[0]
        scores = {
            name: torch.zeros(n, dtype=_dtype(name, like), device=like.device)
            for name in {*outputs, "log_probs", "log_sum_exp"}
        }
        return cls(head, plan, _workspace(head, 0), TokenScores(**scores))

    @property
    def rows(self) -> int:
        return max(self.logits.shape[0], 1)

    def score_(self, begin: int, start: int, stop: int) -> None:
        """Scores the rows from `start` to `stop`, whose logits lie in a workspace from `begin`."""
        labels = self.head.rows(self.head.labels, start, stop)
        logits = self.logits[start - begin : stop - begin]
        wanted = [name for name, out in self.scores._asdict().items() if out is not None]
        part = self.head.score(logits, labels, wanted)
        for out, values in zip(self.scores, part, strict=True):
            if out is not None:
                self.head.store(out, values, start, stop)

    def make_room(self, rows: int) -> None:
        if rows > self.logits.shape[0]:
            self.logits = grown(self.logits, rows)

    def logits_(self, begin: int, start: int, stop: int) -> None:
        if stop > start:
            self.head.logits_(self.logits[start - begin : stop - begin], start, stop)

    def start_gradient(self, dtypes: Sequence[torch.dtype]) -> None:
        """Make room for the gradients; `dtypes` are those in which d weight is summed."""
        head = self.head
        zeros_or_empty = torch.zeros_like if head.order.numel() else torch.empty_like
        self.dhidden = [
            zeros_or_empty(h) if want else h.new_empty(0)
            for h, want in zip(head.hidden, self.plan.want_hidden, strict=True)
        ]
        self.gradient = HeadGradient(head, self.plan, dtypes)

    def use_(self, begin: int, stop: int, grads: ScoreGradients) -> None:
        """Overwrite these rows with dlogits and accumulate d hidden, d weight and d bias.

        `grads` holds a value for every token, in the tokens' own order.
        """
        head, dlogits = self.head, self.logits[: stop - begin]

        def rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else head.rows(values, begin, stop)

        head.score_gradient_(
            dlogits,
            head.rows(head.labels, begin, stop),
            self.scores.map(rows),
            ScoreGradients(*map(rows, grads)),
        )
        for out, weight, want in zip(self.dhidden, head.weight, self.plan.want_hidden, strict=True):
            if want:
                head.hidden_grad_(out, dlogits, weight, begin, stop)
        if self.plan.want_head:
            self.gradient.add(dlogits, begin, None)

    def recompute_and_use_(self, start: int, stop: int, grads: ScoreGradients) -> None:
        for begin in range(start, stop, self.rows):
            end = min(begin + self.rows, stop)
            self.logits_(begin, begin, end)
            self.use_(begin, end, grads)


def _workspace(head: Head, rows: int) -> torch.Tensor:
    return head.hidden[0].new_empty((rows, head.vocab))


def _dtype(name: str, like: torch.Tensor) -> torch.dtype:
    return {"argmax": torch.int64, "is_top1": torch.bool}.get(name, accumulate_dtype(like))


@dataclasses.dataclass
class Kept:
    """The logits of the rows from `start` to `stop`, kept from forward for backward."""

    logits: torch.Tensor  # [at least stop - start, V]
    start: int
    stop: int


def forward(head: Head, plan: Plan, outputs: Sequence[str]) -> tuple[TokenScores, Kept | None]:
    """Return the scores [N] of all tokens, and the last workspace if there will be a backward."""
    n = head.labels.shape[0]
    rows = plan.rows if plan.want_grad else plan.workspace(n)
    scoring = Scoring.start(head, plan, outputs)
    begin = stop = 0
    for begin, start, stop in spans_last_full(n, rows, plan.first, head.supervised):
        needed = stop if start == 0 else rounded(head.supervised(), min(n, rows))
        scoring.make_room(needed if stop - begin > scoring.logits.shape[0] else 0)
        scoring.logits_(begin, start, stop)
        scoring.score_(begin, start, stop)
    kept = Kept(scoring.logits, begin, stop) if plan.want_grad else None
    return scoring.scores, kept


def backward(
    head: Head,
    plan: Plan,
    scores: TokenScores,
    grads: ScoreGradients,
    kept: Kept | None,
    dtypes: Sequence[torch.dtype],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gradients of hidden, of weight (in `dtypes`) and of the bias; uses up `kept`."""
    head.host.check(head.vocab)
    start, stop = (kept.start, kept.stop) if kept else (head.supervised(),) * 2
    scoring = Scoring(
        head, plan, kept.logits if kept else _workspace(head, min(plan.rows, stop)), scores
    )
    few = stop <= 2 * scoring.rows
    scoring.start_gradient([sum_dtype(dtype, few) for dtype in dtypes])
    if stop > start or not stop:
        scoring.use_(start, stop, grads)
    scoring.recompute_and_use_(0, start, grads)
    gradient = scoring.gradient
    dweight = [d.to(dtype) for d, dtype in zip(gradient.weight, dtypes, strict=True)]
    return scoring.dhidden, dweight, gradient.bias


def forward_with_gradient(
    head: Head,
    plan: Plan,
    outputs: Sequence[str],
    dtypes: Sequence[torch.dtype],
    ends: Callable[[], list[int]],
    gradient_of: Callable[[TokenScores, int, int], ScoreGradients],
) -> Scoring:
    """Scores and gradients in one sweep, unit by unit.

    A unit is a group of consecutive rows with a loss of its own. `ends()` waits for the number of
    rows and returns where each unit ends; `gradient_of(scores, first, last)` the gradient of the
    loss of these units in their scores, in the order of tokens. A unit larger than the workspace
    has its logits computed twice.
    """
    n = head.labels.shape[0]
    scoring = Scoring.start(head, plan, outputs)
    queued = min(n, plan.first)
    scoring.make_room(queued)
    scoring.logits_(0, 0, queued)
    units = ends()
    rows = unit_rows(units, plan.rows)
    scoring.make_room(rounded(rows, min(n, plan.rows)))
    parts = list(pack(units, scoring.rows))
    few = sum(-(-(stop - begin) // scoring.rows) for _, _, begin, stop in parts) <= 2
    scoring.start_gradient([sum_dtype(dtype, few) for dtype in dtypes])
    for first, last, begin, stop in parts:
        ready = min(queued, stop) if begin == 0 else begin
        single = stop - begin <= scoring.rows
        if single:
            scoring.logits_(begin, ready, stop)
            scoring.score_(begin, begin, stop)
            scoring.use_(begin, stop, gradient_of(scoring.scores, first, last))
            continue
        for start in range(begin, stop, scoring.rows):
            end = min(start + scoring.rows, stop)
            scoring.logits_(start, max(ready, start), end)
            scoring.score_(start, start, end)
        grads = gradient_of(scoring.scores, first, last)
        scoring.use_(start, stop, grads)  # the last part's logits are still there
        scoring.recompute_and_use_(begin, start, grads)
    if not parts:  # no token has a label: gradients of zero
        scoring.use_(0, 0, gradient_of(scoring.scores, 0, 0))
    return scoring
