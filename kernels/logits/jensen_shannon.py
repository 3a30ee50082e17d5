"""The divergence of a student from a teacher at one token: formula, options, torch reference.

For one token with student logits z_s [V], teacher logits z_t [V] over the same vocabulary, and y of
each as in `transform.py`,

    p_s = softmax(y_s),  p_t = softmax(y_t)
    m = (1 - beta) * p_s + beta * p_t
    KL(p || q) = sum_v p_v * log(p_v / q_v)                    (0 log 0 = 0)

    beta = 0         KL(p_t || p_s)                                       forward KL
    0 < beta < 1     (1 - beta) * KL(p_s || m) + beta * KL(p_t || m)      generalized Jensen-Shannon
    beta = 1         KL(p_s || p_t)                                       reverse KL

as in GKD (arXiv:2306.13649), in nats and without a factor temperature**2. Scale and softcap are
those of each model's own head. With u = KL(p_s || m), the gradient with respect to y_s is

    beta = 0         p_s - p_t
    beta > 0         w * p_s * (log(p_s / m) - u)              w = 1 - beta, and 1 for beta = 1

The mixture at beta = 0 is the student, at beta = 1 the teacher: one expression serves all three.
The student's entropy -sum_v p_s log p_s is a by-product.

Masked vocabulary (logits of -inf) adds nothing where its distribution is the first argument of KL.
Forward KL is infinite where the teacher has a probability that the student masks, reverse KL (with
gradient NaN) where the student has one that the teacher masks; in between it is always finite.

Shapes: N tokens, V vocabulary. The reference computes in fp32, or in fp64 for fp64 student logits.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .transform import Transform, accumulate_dtype


@dataclasses.dataclass(frozen=True)
class DivergenceOptions:
    """The kind of divergence, and each side's logit transform; the module has the formula."""

    beta: float = 0.5
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None

    def __post_init__(self):
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        _ = self.student, self.teacher  # these check the other fields

    @property
    def student(self) -> Transform:
        return Transform(self.scale, self.softcap, self.temperature)

    @property
    def teacher(self) -> Transform:
        return Transform(self.teacher_scale, self.teacher_softcap, self.temperature)

    @property
    def kind(self) -> str:
        return {0.0: "forward", 1.0: "reverse"}.get(float(self.beta), "mixture")

    @property
    def shares(self) -> tuple[float, float]:
        """The factors of KL(p_s || m) and KL(p_t || m)."""
        pure = {"forward": (0.0, 1.0), "reverse": (1.0, 0.0)}
        return pure.get(self.kind, (1.0 - self.beta, float(self.beta)))

    @property
    def log_shares(self) -> tuple[float, float]:
        """The logarithms of 1 - beta and beta; read only for a mixture."""
        if self.kind != "mixture":
            return 0.0, 0.0
        return math.log1p(-self.beta), math.log(self.beta)


DEFAULT = DivergenceOptions()


def _log_ratio(log_p: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
    """Return log p - log m, and 0 (with gradient 0, never NaN) where p is 0."""
    possible = log_p.exp() != 0
    return log_p.where(possible, 0.0) - log_m.where(possible, 0.0)


def log_ratios(log_s: torch.Tensor, log_t: torch.Tensor, options: DivergenceOptions):
    """Return (log(p_s / m), log(p_t / m)) from the logarithms of p_s and p_t."""
    if options.kind == "mixture":
        floor = torch.finfo(log_s.dtype).min / 2  # two -inf would make the gradient NaN
        share_s, share_t = options.log_shares
        a, b = (log_s + share_s).clamp_min(floor), (log_t + share_t).clamp_min(floor)
        log_m = torch.logaddexp(a, b)
    else:
        log_m = log_s if options.kind == "forward" else log_t
    return _log_ratio(log_s, log_m), _log_ratio(log_t, log_m)


def divergence_reference(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    options: DivergenceOptions = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence [N], detached student entropy [N]) in fp32 (fp64 for fp64 students).

    The divergence is differentiable in the logits.
    """
    dtype = accumulate_dtype(student_logits_NV)
    log_s = options.student(student_logits_NV).log_softmax(-1)
    log_t = options.teacher(teacher_logits_NV.to(dtype)).log_softmax(-1)
    ratio_s, ratio_t = log_ratios(log_s, log_t, options)
    share_s, share_t = options.shares
    divergence = share_s * (log_s.exp() * ratio_s).sum(-1)
    divergence = divergence + share_t * (log_t.exp() * ratio_t).sum(-1)
    return divergence, entropy(log_s.detach())


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of distributions given by log-probabilities [..., V]."""
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise ValueError unless student and teacher have vocabularies of the same size."""
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} entries, the teacher's {teacher}. Logits can "
            "be compared only over one vocabulary: take models with the same tokenizer. If only "
            "the padding of the heads differs, model.resize_token_embeddings(...) makes them equal."
        )
