"""KTO: a loss on single completions that are desirable or not (arXiv:2402.01306).

With r = sum_t log p_t - sum_t log p_ref,t of a completion, z an estimate of the KL divergence of
policy and reference, and w its weight (desirable_weight or undesirable_weight), the loss is

    kto                 w * (1 - sigmoid(beta * (r - z)))   of a desirable completion
                        w * (1 - sigmoid(beta * (z - r)))   of an undesirable one
    apo_zero_unpaired   w * (1 - sigmoid(beta * r))         of a desirable completion
                        w * sigmoid(beta * r)               of an undesirable one

the latter from APO (arXiv:2408.06266). z is a constant of the batch, from completions paired with
prompts that they do not answer; see `mismatched_kl`. Names, defaults and values are those of TRL's
KTOTrainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from .sequences import (
    check_like,
    check_name,
    check_range,
    check_sequences,
    sequence_log_probs,
)

LOSS_TYPES = ("kto", "apo_zero_unpaired")


class KTOOutput(NamedTuple):
    """What the loss on B completions returns; all but `loss` are detached."""

    loss: torch.Tensor  # [B]; the batch's loss is the mean over all of its completions
    rewards: torch.Tensor  # [B]
    log_probs: torch.Tensor  # [B], summed over the completion


@torch.no_grad()
def mismatched_kl(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    ref_log_probs: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return z of the formula: the mean of r over B mismatched completions, at least 0.

    Args:
        log_probs: [B, T], fp32 or fp64.
        mask: [B, T], bool.
        ref_log_probs: [B], summed over the completion.
        reduce: averages a scalar over processes; applied before the bound at 0.

    Returns a detached scalar. Raises ValueError if a tensor does not fit.
    """
    check_sequences(log_probs, mask, "[B, T]")
    check_like("ref_log_probs", ref_log_probs, log_probs.shape[:1], log_probs.device)
    z = (sequence_log_probs(log_probs, mask) - ref_log_probs.to(log_probs.dtype)).mean()
    return (z if reduce is None else reduce(z)).clamp_min(0)


@dataclasses.dataclass(frozen=True)
class KTOLoss:
    """KTO or its APO variant; the module's docstring has the formulas.

    Raises ValueError for an unknown name and values out of range.
    """

    beta: float = 0.1
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        check_range("beta", self.beta, 0.0, open_low=True)
        check_range("desirable_weight", self.desirable_weight, 0.0)
        check_range("undesirable_weight", self.undesirable_weight, 0.0)

    @property
    def needs_kl(self) -> bool:
        """Whether the loss reads `kl`."""
        return self.loss_type == "kto"

    @property
    def couples_groups(self) -> bool:
        """Whether a completion's loss depends on the others: no, except through `kl`."""
        return False

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        desirable: torch.Tensor,
        ref_log_probs: torch.Tensor,
        kl: torch.Tensor | None = None,
    ) -> KTOOutput:
        """Return losses and rewards of B completions; the batch's loss is the mean over all.

        Args:
            log_probs: [B, T], fp32 or fp64.
            mask: [B, T], bool, True at the tokens of the completions.
            desirable: [B], bool.
            ref_log_probs: [B], summed over the completion.
            kl: a scalar from `mismatched_kl`; required by kto, refused by apo_zero_unpaired.

        Raises ValueError if a tensor does not fit.
        """
        check_sequences(log_probs, mask, "[B, T]")
        check_like("desirable", desirable, log_probs.shape[:1], log_probs.device)
        check_like("ref_log_probs", ref_log_probs, log_probs.shape[:1], log_probs.device)
        if desirable.dtype != torch.bool:
            raise ValueError(f"desirable is {desirable.dtype}; give desirable.bool()")
        sums_B = sequence_log_probs(log_probs, mask)
        log_ratios_B = sums_B - ref_log_probs.detach().to(log_probs.dtype)
        utility_B = self.beta * (log_ratios_B - self._checked_kl(kl, log_probs))
        loss_B = torch.sigmoid(torch.where(desirable, -utility_B, utility_B))
        loss_B = loss_B * torch.full_like(sums_B, self.undesirable_weight).where(
            ~desirable, self.desirable_weight
        )
        return KTOOutput(loss_B, self.beta * log_ratios_B.detach(), sums_B.detach())

    def _checked_kl(self, kl, log_probs) -> torch.Tensor | float:
        if not self.needs_kl:
            if kl is not None:
                raise ValueError(f"loss_type {self.loss_type} does not read kl: leave it out")
            return 0.0
        check_like("kl", kl, (), log_probs.device)
        return kl.detach().to(log_probs.dtype)
