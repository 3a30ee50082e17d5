"""The loss of one sampled token in GRPO's family; `grpo.py` explains the notation.

    grpo, bnpo, dr_grpo, dapo, luspo   -min(min(u, delta) A, clip(u, 1 - lo, 1 + hi) A)
    cispo                              -stop(min(u, hi)) A log p
    sapo                               -4 / k sigmoid(k (u - 1)) A, k by the sign of A
    vespo                              -stop(phi(W)) A log p,
                                       phi(W) = W^k e^(b (1 - W)), k and b by the sign of A,
                                       W = e^(sum d), each d within 20, log W within [log 1e-8, 20]

where stop() is a constant for the gradient, and delta (INTELLECT-2, arXiv:2505.07291) is optional.
The sampler's own importance ratio, if known, is a factor of W.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .sequences import masked


class Batch(NamedTuple):
    """The inputs of the token losses of B completions."""

    log_probs: torch.Tensor  # [B, T], 0 outside the mask
    log_ratio: torch.Tensor  # [B, T], d, 0 outside the mask
    ratio: torch.Tensor  # [B, T] or [B, 1], u
    advantages: torch.Tensor  # [B, T] or [B, 1], A
    mask: torch.Tensor  # [B, T] bool
    sampling_ratio: torch.Tensor | None  # [B, T] or [B, 1]


class TokenLoss(NamedTuple):
    """Losses [B, T] or [B, 1], and per-token diagnostics; see `grpo.PolicyOutput`."""

    loss: torch.Tensor
    clipped_low: torch.Tensor | None = None
    clipped_high: torch.Tensor | None = None
    sequence_weight: torch.Tensor | None = None


def clipped(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    low: float,
    high: float,
    delta: float | None = None,
) -> TokenLoss:
    """Return PPO's clipped loss (arXiv:1707.06347), with u bounded by `delta`."""
    inside = ratio.clamp(1 - low, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return TokenLoss(
        -torch.minimum(ratio * advantages, inside * advantages),
        (ratio.detach() < 1 - low) & (advantages < 0),
        (ratio.detach() > 1 + high) & (advantages > 0),
    )


def cispo(b: Batch, high: float) -> TokenLoss:
    """Return CISPO's loss, with u bounded by `high`."""
    ratio = b.ratio.detach()
    loss = -ratio.clamp(max=high) * b.advantages * b.log_probs
    return TokenLoss(loss, clipped_high=(ratio > high) & (b.advantages > 0))


def sapo(b: Batch, positive: float, negative: float) -> TokenLoss:
    """Return SAPO's loss; `positive` and `negative` are k by the sign of A."""
    k = _choose(b.advantages > 0, positive, negative, b.ratio)
    return TokenLoss(-4 / k * torch.sigmoid(k * (b.ratio - 1)) * b.advantages)


def vespo(b: Batch, positive: tuple[float, float], negative: tuple[float, float]) -> TokenLoss:
    """Return VESPO's loss; `positive` and `negative` are (k, b) by the sign of A."""
    lowest = math.log(1e-8)
    log_w = b.log_ratio.detach().clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if b.sampling_ratio is not None:
        log_sampling = b.sampling_ratio.log().clamp(lowest, 20.0)
        log_w = log_w + masked(log_sampling, b.mask).sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, 20.0)
    power, decay = (
        _choose(b.advantages >= 0, one, other, log_w)
        for one, other in zip(positive, negative, strict=True)
    )
    phi = (decay + power * log_w - decay * log_w.exp()).exp().nan_to_num(0.0, posinf=0.0)
    return TokenLoss(-phi * b.advantages * b.log_probs, sequence_weight=phi)


def _choose(condition, one: float, other: float, like: torch.Tensor) -> torch.Tensor:
    """Return `one` where `condition` is True, else `other`, in the dtype of `like`."""
    chosen = torch.full(condition.shape, one, dtype=like.dtype, device=like.device)
    return chosen.where(condition, other)
