"""Losses on pairs of a chosen and a rejected completion without a reference model.

With w the chosen and l the rejected completion of a prompt, beta > 0, and for each of them

    m = mean_t log p_t      length-normalized log-probability, over the tokens of the completion
    S = sum_t log p_t

ORPO (arXiv:2403.07691), with odds(m) = e^m / (1 - e^m):

    loss = nll - beta * log sigmoid(log odds(m_w) - log odds(m_l))

nll being the negative log-likelihood of the chosen, prompt included, a mean over the tokens of the
batch.

CPO (arXiv:2401.08417), with e = label_smoothing, x = S for sigmoid and hinge, m for ipo and simpo,
and d = R(x_w) - R(x_l) where R(x) = x, or AlphaPO's (1 - e^(-alpha x)) / alpha (arXiv:2501.03884)
for alpha other than 0, with its exponent bounded by 80:

    sigmoid   -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)
    hinge     max(0, 1 - beta d)                                        SLiC-HF, arXiv:2305.10425
    ipo       (d - 1 / (2 beta))^2                                      IPO, arXiv:2310.12036
    simpo     sigmoid with beta d - simpo_gamma for beta d              SimPO, arXiv:2405.14734

and cpo_alpha * nll is added, nll being the negative log-likelihood of the chosen completion alone,
a mean over the tokens of the batch.

Names, defaults and values are those of TRL's ORPOTrainer and CPOTrainer. A completion without
tokens has m = S = 0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sequences import (
    EXP_BOUND,
    batch_nll,
    check_like,
    check_name,
    check_range,
    check_sequences,
    check_unused,
    lengths,
    sequence_log_probs,
)


class ReferenceFreeOutput(NamedTuple):
    """What a loss on G pairs returns; all but `loss` are detached."""

    loss: torch.Tensor  # [G]; the batch's loss is the mean over all of its groups
    chosen_rewards: torch.Tensor  # [G]
    rejected_rewards: torch.Tensor  # [G]
    chosen_log_probs: torch.Tensor  # [G], means or sums, as the loss reads them
    rejected_log_probs: torch.Tensor  # [G]
    nll: torch.Tensor  # [G], 0 where the loss has none; mean over the batch's groups
    log_odds: torch.Tensor | None = None  # [G], ORPO: log odds(m_w) - log odds(m_l)


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) from log p <= 0; finite with gradient 0 where p is 1.

    log p is bounded by -eps^2 of the dtype, less in magnitude than any mean of rounded
    log-probabilities.
    """
    log_p = log_p.clamp(max=-(torch.finfo(log_p.dtype).eps ** 2))
    # Each form of log(1 - p) is accurate on its own side of p = 1/2. The first has no finite
    # gradient near p = 1, but `where` needs finite gradients even of the values that it drops.
    half = -math.log(2)
    low = torch.log1p(-log_p.clamp(max=half).exp())
    high = torch.log(-torch.expm1(log_p))
    return log_p - low.where(log_p < half, high)


@dataclasses.dataclass(frozen=True)
class ORPOLoss:
    """ORPO; the module's docstring has the formula. `beta` is TRL's name for the paper's lambda.

    Raises ValueError unless beta > 0.
    """

    beta: float = 0.1

    def __post_init__(self):
        check_range("beta", self.beta, 0.0, open_low=True)

    @property
    def couples_groups(self) -> bool:
        """Whether a group's loss depends on the others: yes, nll averages over all their tokens."""
        return True

    @property
    def separable_by_tokens(self) -> bool:
        """Whether groups depend on each other only through the batch's `tokens_per_group`."""
        return True

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        nll_mask: torch.Tensor,
        *,
        tokens_per_group: torch.Tensor | float | None = None,
    ) -> ReferenceFreeOutput:
        """Return losses and rewards of G pairs; the batch's loss is the mean over all groups.

        Args:
            log_probs: [G, 2, T] (chosen, rejected), fp32 or fp64; those of the chosen also at the
                prompt's tokens.
            mask: [G, 2, T], bool, True at the tokens of the completions.
            nll_mask: [G, T], bool, True at the tokens of the chosen's prompt and completion.
            tokens_per_group: `sequences.tokens_per_group` of the whole batch's nll masks. Default:
                these groups are the whole batch.

        Raises ValueError if a tensor does not fit.
        """
        check_sequences(log_probs, mask, "[G, 2, T]")
        check_like("nll_mask", nll_mask, mask[:, 0].shape, log_probs.device)
        if nll_mask.dtype != torch.bool:
            raise ValueError(f"nll_mask is {nll_mask.dtype}; give nll_mask.bool()")
        nll_G = batch_nll(log_probs[:, 0], nll_mask, tokens_per_group)
        means_G2 = sequence_log_probs(log_probs, mask) / lengths(mask, log_probs.dtype)
        odds_G2 = log_odds(means_G2)
        odds_ratio_G = odds_G2[:, 0] - odds_G2[:, 1]
        return ReferenceFreeOutput(
            nll_G - self.beta * F.logsigmoid(odds_ratio_G),
            *(self.beta * means_G2.detach()).unbind(-1),
            *means_G2.detach().unbind(-1),
            nll_G.detach(),
            odds_ratio_G.detach(),
        )


LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo")
_USED_BY = {"label_smoothing": {"sigmoid", "simpo"}, "simpo_gamma": {"simpo"}}


@dataclasses.dataclass(frozen=True)
class CPOLoss:
    """CPO and its variants; the module's docstring has the formulas. `CPOLoss.simpo` is SimPO.

    Raises ValueError for unknown names, values out of range, and options that the loss ignores.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0
    cpo_alpha: float = 1.0

    def __post_init__(self):
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        check_range("beta", self.beta, 0.0, open_low=True)
        check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_range("simpo_gamma", self.simpo_gamma)
        check_range("alpha", self.alpha)
        check_range("cpo_alpha", self.cpo_alpha, 0.0)
        check_unused(self, _USED_BY, (self.loss_type,))

    @classmethod
    def simpo(cls, beta: float = 0.1, gamma: float = 0.5, alpha: float = 0.0, **options) -> CPOLoss:
        """Return SimPO's loss (AlphaPO's with `alpha`): -log sigmoid(beta (m_w - m_l) - gamma).

        nll is added only if `cpo_alpha` is given. The paper uses beta from 2 to 10.
        """
        return cls(beta, "simpo", simpo_gamma=gamma, alpha=alpha, **{"cpo_alpha": 0.0, **options})

    @property
    def couples_groups(self) -> bool:
        """Whether a group's loss depends on the others: nll averages over all their tokens."""
        return self.cpo_alpha != 0.0

    @property
    def separable_by_tokens(self) -> bool:
        """Whether groups depend on each other only through the batch's `tokens_per_group`."""
        return self.couples_groups

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        *,
        tokens_per_group: torch.Tensor | float | None = None,
    ) -> ReferenceFreeOutput:
        """Return losses and rewards of G pairs; the batch's loss is the mean over all groups.

        Args:
            log_probs: [G, 2, T] (chosen, rejected), fp32 or fp64.
            mask: [G, 2, T], bool, True at the tokens of the completions.
            tokens_per_group: `sequences.tokens_per_group` of the whole batch's chosen masks; read
                only if cpo_alpha is not 0. Default: these groups are the whole batch.

        Raises ValueError if a tensor does not fit.
        """
        check_sequences(log_probs, mask, "[G, 2, T]")
        x_G2 = sequence_log_probs(log_probs, mask)
        if self.loss_type in ("ipo", "simpo"):
            x_G2 = x_G2 / lengths(mask, log_probs.dtype)
        rewards_G2 = self._rewards(x_G2)
        loss_G = self._loss(rewards_G2[:, 0] - rewards_G2[:, 1])
        nll_G = torch.zeros_like(loss_G)
        if self.cpo_alpha:
            nll_G = batch_nll(log_probs[:, 0], mask[:, 0], tokens_per_group)
            loss_G = loss_G + self.cpo_alpha * nll_G
        return ReferenceFreeOutput(
            loss_G,
            *(self.beta * rewards_G2.detach()).unbind(-1),
            *x_G2.detach().unbind(-1),
            nll_G.detach(),
        )

    def _rewards(self, x: torch.Tensor) -> torch.Tensor:
        """Return R(x) of the formula."""
        if self.alpha == 0.0:
            return x
        return -torch.expm1((-self.alpha * x).clamp(max=EXP_BOUND)) / self.alpha

    def _loss(self, delta_G: torch.Tensor) -> torch.Tensor:
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * delta_G)
        if self.loss_type == "ipo":
            return (delta_G - 0.5 / self.beta).square()
        x_G = self.beta * delta_G
        if self.loss_type == "simpo":
            x_G = x_G - self.simpo_gamma
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(x_G) - e * F.logsigmoid(-x_G)
