"""Scores of each token from one pass over its logits: formulas, options, torch reference.

For one token with logits z [V], label c and y as in `transform.py`:

    log_sum_exp       = log(sum_v exp(y_v))
    p_v               = exp(y_v - log_sum_exp)
    log_probs         = y_c - log_sum_exp
    entropy           = -sum_v p_v log p_v                     (nats)
    log_sum_sq_probs  = log(sum_v p_v^2)
    mean_logits       = sum_v y_v / V
    argmax            = the smallest v with the largest y_v
    is_top1           = (argmax == c)

log_probs, entropy and log_sum_exp are differentiable in z:

    d / d y_v = g_log_probs (1[v = c] - p_v) - g_entropy p_v (log p_v + entropy) + g_lse p_v

A token whose label is `ignore_index` has zeros (False) everywhere and gradient 0; one whose label
lies outside [0, V) has a NaN log-probability.

Shapes: N tokens, V vocabulary; logits in fp32, bf16 or fp16 (fp64 on the torch path), everything
inside and every result in fp32 (fp64), argmax int64, is_top1 bool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .transform import Transform

EXTRA = ("entropy", "log_sum_exp", "log_sum_sq_probs", "mean_logits", "argmax", "is_top1")
"""What can be requested besides `log_probs`."""

DIFFERENTIABLE = ("log_probs", "entropy", "log_sum_exp")


class TokenScores(NamedTuple):
    """One value per token, or None if not requested. The module's docstring has the formulas."""

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_exp: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    def map(self, fn) -> TokenScores:
        return TokenScores(*(None if x is None else fn(x) for x in self))

    def answer(self, outputs: Sequence[str], shape: torch.Size) -> TokenScores:
        """Return the scores in `shape`, without log_sum_exp unless it was requested.

        log_sum_exp is always computed, because backward needs it.
        """
        requested = self if "log_sum_exp" in outputs else self._replace(log_sum_exp=None)
        return requested.map(lambda x: x.reshape(shape))

    @property
    def constants(self) -> list[torch.Tensor]:
        """The scores that have no gradient."""
        fields = self._asdict().items()
        return [x for name, x in fields if x is not None and name not in DIFFERENTIABLE]


class ScoreGradients(NamedTuple):
    """The gradients [N] of the scores of N tokens; None stands for zero."""

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_exp: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How logits are transformed before the softmax, and which tokens have no label."""

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        _ = self.transform  # this checks the other fields

    @property
    def transform(self) -> Transform:
        return Transform(self.scale, self.softcap, self.temperature)


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return `outputs` as a tuple in the order of `EXTRA`; raise ValueError for unknown ones."""
    unknown = sorted(set(outputs) - {*EXTRA, "log_probs"})
    if unknown:
        raise ValueError(f"unknown outputs {', '.join(unknown)}; known: {', '.join(EXTRA)}")
    return tuple(name for name in EXTRA if name in outputs)


def log_probs_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    options: ScoreOptions = ScoreOptions(),
    outputs: Sequence[str] = (),
) -> TokenScores:
    """Return the scores of each token [N], computed in plain torch and differentiable."""
    vocab = logits_NV.shape[1]
    y_NV = options.transform(logits_NV)
    supervised_N = labels_N != options.ignore_index
    valid_N = (labels_N >= 0) & (labels_N < vocab)
    label_N1 = labels_N.where(valid_N, 0).unsqueeze(1)
    lse_N = torch.logsumexp(y_NV, -1)
    # A factor, not a value, so that the gradient is NaN too.
    nan_N = torch.ones_like(lse_N).masked_fill(supervised_N & ~valid_N, math.nan)
    log_prob_N = (y_NV.gather(1, label_N1).squeeze(1) - lse_N) * nan_N

    def supervised(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.masked_fill(~supervised_N, 0)

    found = {"log_probs": supervised(log_prob_N)}
    logp_NV = y_NV - lse_N.unsqueeze(1)
    if "entropy" in outputs:
        p_NV = logp_NV.exp()
        found["entropy"] = supervised(-(p_NV * logp_NV.masked_fill(p_NV == 0, 0.0)).sum(-1))
    if "log_sum_exp" in outputs:
        found["log_sum_exp"] = supervised(lse_N)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = supervised(torch.logsumexp(2 * logp_NV.detach(), -1))
    if "mean_logits" in outputs:
        found["mean_logits"] = supervised(y_NV.detach().mean(-1))
    if "argmax" in outputs or "is_top1" in outputs:
        argmax_N = y_NV.detach().argmax(-1)
        if "argmax" in outputs:
            found["argmax"] = supervised(argmax_N)
        if "is_top1" in outputs:
            found["is_top1"] = (argmax_N == labels_N) & supervised_N
    return TokenScores(**found)
