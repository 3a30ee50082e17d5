"""The chunk loop of cross entropy: losses of tokens, and their gradient up to the factor g.

Used by `cross_entropy.py`, which describes what it computes and what it costs.

Legend: N tokens, V vocabulary, H_t width of term t, g the gradient that backward receives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..logits.loss import LossOptions
from ..logits.reduction import masked_scale
from ..logits.transform import accumulate_dtype
from .head import LinearHead, Plan, split
from .supervised import Tokens
from .sweep import Sweep, scale_gradients
from .vocab_parallel import token_loss_


class SavedForBackward(NamedTuple):
    """What forward saves for backward. A tensor that is not needed has no elements."""

    filled: int  # rows of `dlogits` that hold a gradient
    dlogits: torch.Tensor  # [rows, V], the one workspace
    dbias: torch.Tensor  # [V]; like the next two, not yet multiplied by g
    dhidden: Sequence[torch.Tensor]  # [N, H_t] each
    dweight: Sequence[torch.Tensor]  # [V, H_t] each, summed over workspaces


@dataclasses.dataclass
class TokenLosses:
    """The operands of one call, with its forward and backward pass."""

    head: LinearHead
    tokens: Tokens
    class_weight: torch.Tensor | None  # [V]
    row_weight: torch.Tensor | None  # [N]; multiplies each token's loss; only in a uniform plan
    plan: Plan
    options: LossOptions

    def _step(self, want_grad: bool, loss_N: torch.Tensor | None = None):
        """Return the step that overwrites logits with dlogits if wanted, and writes `loss_N`."""

        def step(logits: torch.Tensor, start: int, stop: int) -> None:
            labels = self.tokens.pick(self.tokens.labels, start, stop)
            values = token_loss_(
                logits, labels, self.class_weight, self.options, want_grad, self.head.shard
            )
            if loss_N is not None:
                self.tokens.put(loss_N, values, start, stop)

        return step

    def forward(self, static: bool = False) -> tuple[torch.Tensor, SavedForBackward]:
        """Return the losses [N], and the gradients that can be computed before g is known.

        The gradient of the logits is kept for backward if one workspace held all of them. With
        `static`, output shapes must follow from input shapes: it is kept if all N would fit.
        """
        plan, tokens = self.plan, self.tokens
        n = tokens.labels.shape[0]
        rows = plan.workspace(n)
        sweep = Sweep(self.head, tokens, plan)
        if static:
            sweep.make_room(min(n, rows))
        sweep.choose_sum_dtypes(at_most_two=n <= 2 * rows)
        new = torch.zeros if tokens.order.numel() else torch.empty  # ignored rows are zero
        loss_N = new(n, dtype=accumulate_dtype(sweep.logits), device=self.head.device)
        kept, stop = False, 0
        for begin, stop in sweep.workspaces(self._step(plan.want_grad, loss_N), rows):
            sweep.add_hidden(begin, stop)
            kept = plan.want_head and tokens.supervised() <= (n if static else rows) <= rows
            if plan.want_head and plan.uniform and not kept:
                sweep.add_head(begin, stop, self.row_weight)
        dlogits = sweep.logits if kept else sweep.new_logits(0)
        saved = SavedForBackward(stop if kept else 0, dlogits, *split(sweep.flat_gradients()))
        return loss_N, saved

    def backward(self, g: torch.Tensor, saved: SavedForBackward):
        """Return d hidden, d weight (in its dtype) and d bias; g is a scalar if uniform, else [N].

        Ignored rows get a gradient of exactly 0, even from an infinite or NaN g (a loss that was
        divided by a count of 0).
        """
        plan, tokens, dtypes = self.plan, self.tokens, self.head.dtypes
        tokens.check()
        supervised_N = tokens.labels != self.options.ignore_index
        scale_N = masked_scale(g if self.row_weight is None else g * self.row_weight, supervised_N)
        grads = saved.dbias, *saved.dhidden, *saved.dweight
        dhidden, dweight, dbias = scale_gradients(grads, g, supervised_N, dtypes, scale_N)
        if not plan.want_head or dbias.numel() or any(d.numel() for d in dweight):
            return dhidden, dweight, dbias
        sweep = Sweep(self.head, tokens, plan, saved.dlogits)
        if saved.filled or not tokens.supervised():
            sweep.add_head(0, saved.filled, scale_N)
            return dhidden, *sweep.gradients()[1:]
        # Forward did not know g and had no room for all logits, so they are computed again.
        total = tokens.supervised()
        sweep.logits = sweep.new_logits(min(total, plan.workspace(total)))
        sweep.choose_sum_dtypes(at_most_two=tokens.labels.shape[0] <= 2 * plan.rows)
        for begin, stop in sweep.recompute(0, total, self._step(want_grad=True)):
            sweep.add_head(begin, stop, scale_N)
        return dhidden, *sweep.gradients()[1:]
