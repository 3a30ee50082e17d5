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

    def reshape(self, shape: torch.Size) -> TokenScores:
        return self.map(lambda x: x.reshape(shape))

    @property
    def constants(self) -> list[torch.Tensor]:
        """The scores that have no gradient."""
        fields = self._asdict().items()
        return [x for name, x in fields if x is not None and name not in DIFFERENTIABLE]


class Normalizer(NamedTuple):
    """log_sum_exp of N tokens, in two parts.

    Their sum is rounded. If the logits have a large common offset, y - log_sum_exp would be exact
    only to the rounding of that offset, and so would the probabilities.
    """

    top: torch.Tensor  # max_v y_v; not differentiable
    log_total: torch.Tensor  # log(sum_v exp(y_v - top))

    @classmethod
    def of(cls, y_NV: torch.Tensor) -> Normalizer:
        top_N = y_NV.detach().amax(-1)
        shift_N = top_N.masked_fill(top_N == -math.inf, 0.0)  # or y - top would be NaN
        return cls(top_N, torch.logsumexp(y_NV - shift_N.unsqueeze(1), -1))

    @property
    def log_sum_exp(self) -> torch.Tensor:
        return self.top + self.log_total

    def log_p(self, y_NV: torch.Tensor) -> torch.Tensor:
        """Return log p_v."""
        return y_NV - self.top.unsqueeze(1) - self.log_total.unsqueeze(1)


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
    return scores_and_normalizer(logits_NV, labels_N, options, outputs)[0]


def scores_and_normalizer(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, options: ScoreOptions, outputs: Sequence[str]
) -> tuple[TokenScores, Normalizer]:
    """Return `log_probs_reference`, and what its gradient depends on."""
    vocab = logits_NV.shape[1]
    y_NV = options.transform(logits_NV)
    supervised_N = labels_N != options.ignore_index
    valid_N = (labels_N >= 0) & (labels_N < vocab)
    label_N1 = labels_N.where(valid_N, 0).unsqueeze(1)
    normalizer = Normalizer.of(y_NV)
    logp_NV = normalizer.log_p(y_NV)
    # A factor, not a value, so that the gradient is NaN too.
    nan_N = torch.ones_like(normalizer.top).masked_fill(supervised_N & ~valid_N, math.nan)
    log_prob_N = logp_NV.gather(1, label_N1).squeeze(1) * nan_N

    def supervised(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.masked_fill(~supervised_N, 0)

    found = {"log_probs": supervised(log_prob_N)}
    if "entropy" in outputs:
        p_NV = logp_NV.exp()
        found["entropy"] = supervised(-(p_NV * logp_NV.masked_fill(p_NV == 0, 0.0)).sum(-1))
    if "log_sum_exp" in outputs:
        found["log_sum_exp"] = supervised(normalizer.log_sum_exp)
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
    return TokenScores(**found), normalizer
