"""The chunk loop of a linear head that scores tokens: log-probabilities and their gradient.

There are two ways to compute the gradient. Both are used by `log_probs.py` and `log_prob_loss.py`,
which describe what they compute and what it costs:

- `forward` and `backward`: the caller computes the loss, and its gradient arrives in backward. The
  last workspace of logits is kept until then; logits that did not fit it are recomputed.
- `forward_with_gradient`: the gradient of the loss with respect to the scores of some rows is known
  as soon as the scores are. It is used at once, and nothing is computed twice.

Legend: N tokens, V vocabulary, H_t width of term t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..logits.scores import Normalizer, ScoreGradients, ScoreOptions, TokenScores
from ..logits.transform import accumulate_dtype
from .head import LinearHead, Plan
from .supervised import Tokens
from .sweep import Sweep
from .vocab_parallel import score, score_gradient_
from .workspace import group_workspace, pack_groups, round_up_rows


class Scoring(Sweep):
    """A sweep that scores rows, and computes gradients once the scores' gradients are known."""

    def __init__(
        self, head: LinearHead, tokens: Tokens, plan: Plan, options: ScoreOptions,
        scores: TokenScores, normalizer: Normalizer,
    ):  # fmt: skip
        super().__init__(head, tokens, plan)
        self.options, self.scores, self.normalizer = options, scores, normalizer

    @classmethod
    def start(cls, head, tokens, plan, options, outputs: Sequence[str]) -> Scoring:
        """Return a sweep whose scores are all zero, as they stay for tokens without a label."""
        n, like = tokens.labels.shape[0], head.hidden[0]

        def zeros(name: str) -> torch.Tensor:
            return torch.zeros(n, dtype=_dtype(name, like), device=like.device)

        scores = TokenScores(**{name: zeros(name) for name in {*outputs, "log_probs"}})
        normalizer = Normalizer(*map(zeros, Normalizer._fields))
        return cls(head, tokens, plan, options, scores, normalizer)

    def score_(self, logits: torch.Tensor, start: int, stop: int) -> None:
        """Write the scores of the rows from `start` to `stop`."""
        labels = self.tokens.pick(self.tokens.labels, start, stop)
        wanted = [name for name, out in self.scores._asdict().items() if out is not None]
        scores, normalizer = score(logits, labels, self.options, wanted, self.head.shard)
        outs = (*self.scores, *self.normalizer)
        for out, values in zip(outs, (*scores, *normalizer), strict=True):
            if out is not None:
                self.tokens.put(out, values, start, stop)

    def backward_(self, begin: int, stop: int, grads: ScoreGradients) -> None:
        """Overwrite the workspace with dlogits of these rows, and add their d hidden and d weight.

        `grads` holds a value for every token, in the tokens' own order.
        """

        def rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else self.tokens.pick(values, begin, stop)

        score_gradient_(
            self.logits[: stop - begin], rows(self.tokens.labels),
            Normalizer(*map(rows, self.normalizer)), rows(self.scores.entropy),
            ScoreGradients(*map(rows, grads)), self.options, self.head.shard,
        )  # fmt: skip
        self.add_hidden(begin, stop)
        self.add_head(begin, stop)

    def recompute_backward_(self, start: int, stop: int, grads: ScoreGradients) -> None:
        for begin, end in self.recompute(start, stop):
            self.backward_(begin, end, grads)


def _dtype(name: str, like: torch.Tensor) -> torch.dtype:
    return {"argmax": torch.int64, "is_top1": torch.bool}.get(name, accumulate_dtype(like))


class SavedLogits(NamedTuple):
    """The logits of the rows from `start` to `stop`, saved by forward for backward."""

    logits: torch.Tensor  # [at least stop - start, V]
    start: int
    stop: int


def forward(scoring: Scoring) -> SavedLogits | None:
    """Score all tokens, and return the last workspace if there will be a backward."""
    plan = scoring.plan
    rows = plan.rows if plan.want_grad else plan.workspace(scoring.tokens.labels.shape[0])
    # Backward recomputes the logits that the last workspace does not hold.
    *_, (begin, stop) = scoring.workspaces(scoring.score_, rows, last_full=True)
    return SavedLogits(scoring.logits, begin, stop) if plan.want_grad else None


def backward(scoring: Scoring, grads: ScoreGradients, saved: SavedLogits | None):
    """Return (d hidden, d weight, d bias); overwrites the logits of `saved`."""
    scoring.tokens.check()
    start, stop = (saved.start, saved.stop) if saved else (scoring.tokens.supervised(),) * 2
    scoring.logits = saved.logits if saved else scoring.new_logits(min(scoring.plan.rows, stop))
    scoring.choose_sum_dtypes(at_most_two=stop <= 2 * scoring.rows)
    if stop > start or not stop:
        scoring.backward_(start, stop, grads)
    scoring.recompute_backward_(0, start, grads)
    return scoring.gradients()


def forward_with_gradient(
    scoring: Scoring,
    ends: Callable[[], list[int]],
    gradient_of: Callable[[TokenScores, int, int], ScoreGradients],
) -> None:
    """Compute scores and gradients in one sweep, group by group.

    A group consists of consecutive rows whose loss depends on no other row. `ends()` waits for the
    number of rows and returns the row at which each group ends. `gradient_of(scores, first, last)`
    returns the gradient of these groups' loss with respect to the scores, in the order of tokens.
    If a group is larger than the workspace, its logits are computed twice. A workspace ends where a
    group ends, not at a fixed number of rows, so `Sweep.workspaces` does not serve here.
    """
    n, plan = scoring.tokens.labels.shape[0], scoring.plan
    queued = min(n, plan.first)
    if queued:
        scoring.make_room(queued)
        scoring.fill_(scoring.logits, 0, queued)
    group_ends = ends()
    scoring.make_room(round_up_rows(group_workspace(group_ends, plan.rows), min(n, plan.rows)))
    parts = list(pack_groups(group_ends, scoring.rows))
    workspaces = sum(-(-(stop - begin) // scoring.rows) for _, _, begin, stop in parts)
    scoring.choose_sum_dtypes(at_most_two=workspaces <= 2)
    for first, last, begin, stop in parts:
        ready = min(queued, stop) if begin == 0 else begin
        for start in range(begin, max(stop, begin + 1), scoring.rows):
            end = min(start + scoring.rows, stop)
            missing = max(ready, start)
            if missing < end:
                scoring.fill_(scoring.logits[missing - start : end - start], missing, end)
            scoring.score_(scoring.logits[: end - start], start, end)
        grads = gradient_of(scoring.scores, first, last)
        scoring.backward_(start, stop, grads)  # the workspace still holds these logits
        scoring.recompute_backward_(begin, start, grads)
    if not parts:  # no token has a label: gradients of zero
        scoring.backward_(0, 0, gradient_of(scoring.scores, 0, 0))
