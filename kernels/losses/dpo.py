"""Losses on pairs of a chosen and a rejected completion with a reference model: DPO's family.

With w the chosen and l the rejected completion of a prompt, beta > 0, and for each of them

    r = sum_t log p_t - sum_t log p_ref,t       log-ratio of policy and reference
    s = f'(e^r)                                 score; r itself for f_divergence_type reverse_kl
    n                                           number of its tokens, at least 1
    d = s_w - s_l,  e = label_smoothing,  sg = sigmoid,  lsg = log sigmoid

the loss of a pair is

    sigmoid       -lsg(beta d)                                         DPO, arXiv:2305.18290
    hinge         max(0, 1 - beta d)                                   SLiC-HF, arXiv:2305.10425
    ipo           (s_w / n_w - s_l / n_l - 1 / (2 beta))^2             IPO, arXiv:2310.12036
    exo_pair      KL([sg(beta d), sg(-beta d)] || [1 - e, e])          EXO, arXiv:2402.00856
    nca_pair      -lsg(beta r_w) - lsg(-beta r_w) / 2 - lsg(-beta r_l) / 2   arXiv:2402.05369
    robust        (-(1 - e) lsg(beta d) + e lsg(-beta d)) / (1 - 2 e)  arXiv:2403.00409
    bco_pair      -lsg(beta r_w) - lsg(-beta r_l), no reward shift     BCO, arXiv:2404.04656
    sppo_hard     (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2      SPPO, arXiv:2405.00675
    aot           -(1 - e) lsg(beta q) - e lsg(-beta q), q as below    AOT, arXiv:2406.05882
    aot_unpaired  the same
    apo_zero      1 - sg(beta r_w) + sg(beta r_l)                      APO, arXiv:2408.06266
    apo_down      sg(beta r_w) + 1 - sg(beta (r_w - r_l))
    discopop      -lsg(x) sg(-x / tau) + e^(-x) sg(x / tau), x = beta d     arXiv:2406.08414
    sft           -sum_t log p_t of w / tokens of all w * pairs        MPO, arXiv:2411.10442
    sigmoid_norm  -lsg(beta (s_w / n_w - s_l / n_l))                   Tulu 3, arXiv:2411.15124

AOT compares distributions: q pairs quantiles, not completions. For aot, q is the sorted log p_w -
log p_l minus the sorted difference of the reference; for aot_unpaired, the sorted r_w minus the
sorted r_l.

f_divergence_type (f-DPO, arXiv:2309.16240): forward_kl s = 1 - e^(-r), js_divergence
s = log 2 + lsg(r), alpha_divergence s = (e^((a - 1) r) - 1) / (a - 1) with a =
f_alpha_divergence_coef, r itself at a = 1. Their exponents are bounded by 80; in fp32 the square of
ipo overflows beyond 44. use_weighting (WPO, arXiv:2406.11827) multiplies a pair's loss by the
constant exp(mean_t (log p_t - log sum_v p_v^2)) of w and of l. ld_alpha is LD-DPO's weight of the
tokens beyond the shorter completion, see `sequences.sequence_log_probs`.

Names, defaults and values are those of TRL's DPOTrainer. n counts the True values of `mask`: a
first token without a prompt has no log-probability and does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sequences import (
    EXP_BOUND,
    batch_nll,
    bounded_exp,
    check_like,
    check_name,
    check_range,
    check_sequences,
    check_unused,
    lengths,
    masked,
    sequence_log_probs,
)


class PreferenceOutput(NamedTuple):
    """What a loss on G pairs returns; all but `loss` are detached."""

    loss: torch.Tensor  # [G]; the batch's loss is the mean over all of its groups
    chosen_rewards: torch.Tensor  # [G]
    rejected_rewards: torch.Tensor  # [G]
    chosen_log_probs: torch.Tensor  # [G], as the loss reads them
    rejected_log_probs: torch.Tensor  # [G]


class _Pairs(NamedTuple):
    """The inputs of the losses of G pairs; [G, 2] is (chosen, rejected)."""

    log_probs: torch.Tensor  # [G, T], of the chosen
    mask: torch.Tensor  # [G, T], of the chosen
    sums: torch.Tensor  # [G, 2]
    ref: torch.Tensor  # [G, 2]
    scores: torch.Tensor  # [G, 2]
    lengths: torch.Tensor  # [G, 2]
    tokens_per_group: torch.Tensor | float | None

    @property
    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = (self.sums - self.ref).unbind(-1)
        return chosen, rejected

    @property
    def delta(self) -> torch.Tensor:
        return _difference(self.scores)

    @property
    def mean_delta(self) -> torch.Tensor:
        return _difference(self.scores / self.lengths)


def _difference(values_G2: torch.Tensor) -> torch.Tensor:
    return values_G2[:, 0] - values_G2[:, 1]


def _exo_pair(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    log_chosen, log_rejected = F.logsigmoid(o.beta * p.delta), F.logsigmoid(-o.beta * p.delta)
    return log_chosen.exp() * (log_chosen - math.log1p(-o.label_smoothing)) + (
        log_rejected.exp() * (log_rejected - math.log(o.label_smoothing))
    )


def _nca_pair(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    chosen, rejected = (o.beta * r for r in p.log_ratios)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _robust(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    e, x = o.label_smoothing, o.beta * p.delta
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e)


def _bco_pair(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    chosen, rejected = p.log_ratios
    return -F.logsigmoid(o.beta * chosen) - F.logsigmoid(-o.beta * rejected)


def _sppo_hard(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    chosen, rejected = p.log_ratios
    return (chosen - 0.5 / o.beta).square() + (rejected + 0.5 / o.beta).square()


def _aot(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    return _quantiles(o, _difference(p.sums), _difference(p.ref))


def _aot_unpaired(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    return _quantiles(o, *p.log_ratios)


def _quantiles(o: DPOLoss, preferred: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x = o.beta * (preferred.sort().values - other.sort().values)
    return -(1 - o.label_smoothing) * F.logsigmoid(x) - o.label_smoothing * F.logsigmoid(-x)


def _apo_zero(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    chosen, rejected = p.log_ratios
    return torch.sigmoid(-o.beta * chosen) + torch.sigmoid(o.beta * rejected)


def _apo_down(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    chosen, rejected = p.log_ratios
    return torch.sigmoid(o.beta * chosen) + torch.sigmoid(-o.beta * (chosen - rejected))


def _discopop(o: DPOLoss, p: _Pairs) -> torch.Tensor:
    x = o.beta * p.delta
    gate = x / o.discopop_tau
    # One exponent for e^-x sigmoid(gate): computed separately, the factors overflow to inf * 0.
    return bounded_exp(F.logsigmoid(gate) - x) - F.logsigmoid(x) * torch.sigmoid(-gate)


_LOSSES: dict[str, Callable[[DPOLoss, _Pairs], torch.Tensor]] = {
    "sigmoid": lambda o, p: -F.logsigmoid(o.beta * p.delta),
    "hinge": lambda o, p: torch.relu(1 - o.beta * p.delta),
    "ipo": lambda o, p: (p.mean_delta - 0.5 / o.beta).square(),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": lambda o, p: batch_nll(p.log_probs, p.mask, p.tokens_per_group),
    "sigmoid_norm": lambda o, p: -F.logsigmoid(o.beta * p.mean_delta),
}
LOSS_TYPES = tuple(_LOSSES)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

_SORTING = {"aot", "aot_unpaired"}
_SCORED = {"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"}
_USED_BY = {
    "label_smoothing": {"exo_pair", "robust", *_SORTING},
    "discopop_tau": {"discopop"},
    "f_divergence_type": _SCORED,
    "ld_alpha": set(LOSS_TYPES) - {"sft"},
}


@dataclasses.dataclass(frozen=True)
class DPOLoss:
    """A loss of DPO's family or a weighted sum of several; the module's docstring has the formulas.

    `loss_type` is one name or several, `loss_weights` are their weights (default 1 each). Raises
    ValueError for unknown names, values out of range, and options that no chosen loss uses.
    """

    beta: float = 0.1
    loss_type: str | Sequence[str] = ("sigmoid",)
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05

    def __post_init__(self):
        names = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        object.__setattr__(self, "loss_type", names)
        if not names:
            raise ValueError(f"loss_type names no loss; known are {', '.join(LOSS_TYPES)}")
        for name in names:
            check_name("loss_type", name, LOSS_TYPES)
        self._check_weights()
        check_name("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        check_range("beta", self.beta, 0.0, open_low=True)
        check_range("ld_alpha", self.ld_alpha, 0.0, 1.0)
        check_range("discopop_tau", self.discopop_tau, 0.0, open_low=True)
        check_range("f_alpha_divergence_coef", self.f_alpha_divergence_coef)
        check_unused(self, _USED_BY, names)
        self._check_label_smoothing()
        self._check_f_divergence()
        unweighted = [n for n in names if n in _SORTING | {"sft"}]
        if self.use_weighting and unweighted:
            raise ValueError(
                f"use_weighting weighs pairs, and loss_type {', '.join(unweighted)} is not a sum "
                "over pairs: leave one of them out"
            )

    def _check_weights(self):
        if self.loss_weights is None:
            return
        object.__setattr__(self, "loss_weights", tuple(self.loss_weights))
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} "
                f"losses ({', '.join(self.loss_type)}); give one for each"
            )
        for weight in self.loss_weights:
            check_range("loss_weights", weight)

    def _check_label_smoothing(self):
        if "exo_pair" in self.loss_type and self.label_smoothing == 0.0:
            raise ValueError(
                "label_smoothing must be positive with exo_pair, whose target is [1 - e, e]; its "
                "paper uses 1e-3"
            )
        highest = 0.5 if "robust" in self.loss_type else 1.0
        open_high = bool({"robust", "exo_pair"} & set(self.loss_type))
        check_range("label_smoothing", self.label_smoothing, 0.0, highest, open_high=open_high)

    def _check_f_divergence(self):
        unscored = [n for n in self.loss_type if n not in _SCORED | {"sft"}]
        if self.f_divergence_type != "reverse_kl" and unscored:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} is not defined for loss_type "
                f"{', '.join(unscored)}, which does not read the scores' difference; with "
                f"f-divergences there are {', '.join(sorted(_SCORED))}"
            )
        given = self.f_alpha_divergence_coef != DPOLoss.f_alpha_divergence_coef
        if given and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef} has no effect on "
                f"f_divergence_type {self.f_divergence_type}: leave it out, or choose "
                "alpha_divergence"
            )

    @property
    def couples_groups(self) -> bool:
        """Whether a group's loss depends on the others, so that one call needs the whole batch."""
        return bool({"sft", *_SORTING} & set(self.loss_type))

    @property
    def separable_by_tokens(self) -> bool:
        """Whether groups depend on each other only through the batch's `tokens_per_group`."""
        return self.couples_groups and not _SORTING & set(self.loss_type)

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        ref_log_probs: torch.Tensor,
        *,
        log_sum_sq_probs: torch.Tensor | None = None,
        tokens_per_group: torch.Tensor | float | None = None,
    ) -> PreferenceOutput:
        """Return losses and rewards of G pairs; the batch's loss is the mean over all groups.

        Args:
            log_probs: [G, 2, T] (chosen, rejected), fp32 or fp64.
            mask: [G, 2, T], bool, True at the tokens of the completions.
            ref_log_probs: [G, 2], the reference's `sequence_log_probs`.
            log_sum_sq_probs: [G, 2, T], log sum_v p_v^2; needed by use_weighting.
            tokens_per_group: `sequences.tokens_per_group` of the whole batch's chosen masks; read
                by sft. Default: these groups are the whole batch.

        With aot, losses are in sorted order. Raises ValueError if a tensor does not fit.
        """
        check_sequences(log_probs, mask, "[G, 2, T]")
        check_like("ref_log_probs", ref_log_probs, log_probs.shape[:2], log_probs.device)
        sums_G2 = sequence_log_probs(log_probs, mask, self.ld_alpha)
        ref_G2 = ref_log_probs.detach().to(log_probs.dtype)
        pairs = _Pairs(
            log_probs=log_probs[:, 0],
            mask=mask[:, 0],
            sums=sums_G2,
            ref=ref_G2,
            scores=self._scores(sums_G2 - ref_G2),
            lengths=lengths(mask, log_probs.dtype),
            tokens_per_group=tokens_per_group,
        )
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        loss_G = sum(
            weight * _LOSSES[name](self, pairs)
            for name, weight in zip(self.loss_type, weights, strict=True)
        )
        if self.use_weighting:
            loss_G = loss_G * self._pair_weights(log_probs, mask, log_sum_sq_probs)
        rewards_G2 = self.beta * (sums_G2.detach() - ref_G2)
        return PreferenceOutput(loss_G, *rewards_G2.unbind(-1), *sums_G2.detach().unbind(-1))

    def _scores(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """Return f'(t) at t = e^log_ratios."""
        if self.f_divergence_type == "forward_kl":
            return -torch.expm1((-log_ratios).clamp(max=EXP_BOUND))
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratios)
        power = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "reverse_kl" or abs(power) < 1e-6:
            return log_ratios
        return torch.expm1((power * log_ratios).clamp(max=EXP_BOUND)) / power

    @torch.no_grad()
    def _pair_weights(self, log_probs, mask, log_sum_sq_probs) -> torch.Tensor:
        """Return WPO's weights [G]."""
        check_like("log_sum_sq_probs", log_sum_sq_probs, log_probs.shape, log_probs.device)
        aligned_G2 = masked(log_probs - log_sum_sq_probs, mask).sum(-1)
        return (aligned_G2 / lengths(mask, log_probs.dtype)).sum(-1).exp()
