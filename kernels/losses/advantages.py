"""Advantages of sampled completions from their rewards.

Of the n = num_generations completions of a prompt, which stand next to each other, with rewards R:

    group          (R - mean of the n) / (std of the n + 1e-4)               GRPO, arXiv:2402.03300
    leave one out  R - mean of the other n - 1                               RLOO, arXiv:2402.14740

std has Bessel's correction. A reward of NaN means that the completion could not be scored: it is
excluded from all means, and its advantage is 0. So is the advantage of a completion that has no
other to compare with. Values are those of TRL's GRPOTrainer and RLOOTrainer.
"""

from __future__ import annotations

import torch

from .sequences import check_name

_EPS = 1e-4
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: torch.Tensor, num_generations: int, scale: str = "group"
) -> torch.Tensor:
    """Return GRPO's advantages [B] of completions.

    Args:
        rewards: [B], fp32 or fp64, of the whole batch of all processes.
        num_generations: completions per prompt.
        scale: "group" divides by the std of the group, "batch" by the std of all rewards; "none"
            does not divide (Dr. GRPO, arXiv:2503.20783).

    Raises ValueError for an unknown `scale`, or rewards that are not [prompts * num_generations].
    """
    check_name("scale", scale, SCALES)
    grouped = _grouped(rewards, num_generations)
    centered = grouped - grouped.nanmean(1, keepdim=True)
    if scale == "group":
        centered = centered / (_std(grouped, 1) + _EPS)
    elif scale == "batch":
        centered = centered / (_std(rewards, 0) + _EPS)
    return centered.flatten().nan_to_num(0.0)


def leave_one_out_advantages(
    rewards: torch.Tensor, num_generations: int, normalize: bool = False
) -> torch.Tensor:
    """Return RLOO's advantages [B] of completions.

    Args:
        rewards: [B], fp32 or fp64, of the whole batch of all processes.
        num_generations: completions per prompt.
        normalize: subtract the advantages' mean and divide by their standard deviation + 1e-4.

    Raises ValueError for rewards that are not [prompts * num_generations].
    """
    grouped = _grouped(rewards, num_generations)
    others = (~grouped.isnan()).sum(1, keepdim=True) - 1
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / others
    advantages = (grouped - baseline).flatten()
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (_std(advantages, 0) + _EPS)
    return advantages.nan_to_num(0.0)


def _grouped(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    if rewards.dim() != 1 or num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} must be [prompts * num_generations], and "
            f"num_generations is {num_generations}"
        )
    return rewards.view(-1, num_generations)


def _std(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the unbiased standard deviation of the values that are not NaN; NaN for one value."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1)).sqrt()
