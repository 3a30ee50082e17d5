"""Scores of labels, and divergences, from logits that may be deferred; then they stay deferred.

Also registers the expressions with which user code scores tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from liger_trainer.deferred.handlers import implements, per_token
from liger_trainer.deferred.head_call import consume
from liger_trainer.deferred.logits import DeferredLogits, consume_logits
from liger_trainer.deferred.state import State
from liger_trainer.deferred.tensor import Deferred
from liger_trainer.kernels.linear.divergence import linear_divergence
from liger_trainer.kernels.linear.head import LinearHead
from liger_trainer.kernels.linear.log_probs import linear_log_probs
from liger_trainer.kernels.logits.divergence import divergence as divergence_of_logits
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions
from liger_trainer.kernels.logits.log_probs import log_probs
from liger_trainer.kernels.logits.reduction import scale_sum
from liger_trainer.kernels.logits.scores import ScoreOptions, TokenScores


def token_scores(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    weighting: str | None = None,
) -> TokenScores:
    """Return scores of `labels` [...] under `logits` [..., V]; label -100 marks ignored tokens.

    Deferred logits go through `linear_log_probs` with the scale and softcap that the model applied
    to them; `weighting` is explained there. Other logits go through `log_probs`.
    """
    state = fusable(logits)
    plain_options = ScoreOptions(temperature=temperature)

    def plain(z: torch.Tensor) -> TokenScores:
        return log_probs(z, labels, outputs=outputs, options=plain_options)

    if state is not None:
        if state.origin.dtype == torch.float16:
            weighting = None  # the loss scale must come before the logits' gradient is rounded
        own = state.transform
        options = dataclasses.replace(plain_options, scale=own.scale, softcap=own.softcap)
        scores = _fused_scores(logits, labels, options, plain, outputs, weighting)
        if scores is not None:
            return scores
    return plain(logits.materialize() if isinstance(logits, Deferred) else logits)


def _fused_scores(
    logits: DeferredLogits, labels: torch.Tensor, options: ScoreOptions, plain,
    outputs: Sequence[str] = (), weighting: str | None = None,
) -> TokenScores | None:  # fmt: skip
    """Return scores of the head's logits under `options`; None if they cannot be fused."""

    def fused(head: LinearHead):
        return linear_log_probs(
            head.hidden, head.weight, labels, head.bias,
            outputs=outputs, options=options, weighting=weighting, shard=head.shard,
        )  # fmt: skip

    results = consume_logits(logits, fused, plain, shards=True)
    return None if results is None else TokenScores(*results)


def fusable(logits: torch.Tensor) -> State | None:
    """Return the state of deferred logits if a fused kernel can consume them, else None."""
    state = logits.state if isinstance(logits, DeferredLogits) else None
    if state is None or not state.origin.fused or state.has_log_softmax or not state.transform:
        return None
    return state


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple:
    """Return (divergence, student entropy) of the logits at the tokens that `mask` keeps.

    The divergence (generalized Jensen-Shannon) is reduced; the entropy is per token. Logits may be
    deferred.
    """
    states = fusable(student), fusable(teacher)
    plain_options = DivergenceOptions(float(beta), float(temperature))

    def plain(z, other=None):
        other = teacher if other is None else other
        other = other.materialize() if isinstance(other, Deferred) else other
        values, entropy = divergence_of_logits(z, other.detach(), plain_options)
        values, entropy = values.where(mask, 0.0), entropy.where(mask, 0.0)
        if reduction == "none":
            return values, entropy
        count = mask.sum().clamp_min(1)
        return scale_sum(values.sum(), reduction, count, num_items_in_batch), entropy

    results = None
    if None not in states:
        own, others = (s.transform for s in states)
        options = dataclasses.replace(
            plain_options, scale=own.scale, softcap=own.softcap,
            teacher_scale=others.scale, teacher_softcap=others.softcap,
        )  # fmt: skip

        def fused(head: LinearHead):
            def with_teacher(other: LinearHead):
                other = states[1].with_ops(other)
                hidden = [h.detach().to(states[1].origin.dtype) for h in other.hidden]
                return linear_divergence(
                    head.hidden, head.weight, hidden, other.weight, mask, head.bias, other.bias,
                    options=options, reduction=reduction, num_items_in_batch=num_items_in_batch,
                )  # fmt: skip

            teacher = states[1].origin
            teacher.check()
            with teacher.weights():
                return consume(states[1].terms, with_teacher)

        results = consume_logits(student, fused, plain)
    if results is None:
        results = plain(student.materialize() if isinstance(student, Deferred) else student)
    return results


# --- expressions in user code ---------------------------------------------------------------------


@implements(torch.gather, torch.Tensor.gather)
def _gather(input, dim, index):
    return _label_log_probs(input, dim, index)


@implements(torch.take_along_dim, torch.Tensor.take_along_dim)
def _take_along_dim(input, indices, dim=None):
    return _label_log_probs(input, dim, indices)


_MATCHES_NONE = -(2**31)  # an ignore_index: torch does not gather -100 either


def _label_log_probs(logits, dim, index):
    """Return the labels' log-probabilities, log_softmax(logits).gather(-1, labels)."""
    state = logits.state if isinstance(logits, DeferredLogits) else None
    if state is None or not isinstance(index, torch.Tensor) or not isinstance(dim, int):
        return NotImplemented
    fits = dim % logits.ndim == logits.ndim - 1 and index.shape == (*logits.shape[:-1], 1)
    names = [name for name, _ in state.ops]
    if not fits or "log_softmax" not in names or index.dtype != torch.int64:
        return NotImplemented
    transform = dataclasses.replace(state, ops=state.ops[: names.index("log_softmax")]).transform
    if not state.origin.fused or transform is None:
        return NotImplemented
    options = ScoreOptions(_MATCHES_NONE, transform.scale, transform.softcap)
    scores = _fused_scores(
        logits, index.squeeze(-1), options, lambda z: TokenScores(z.gather(-1, index).squeeze(-1))
    )
    return NotImplemented if scores is None else scores.log_probs.unsqueeze(-1).to(logits.dtype)


@implements(torch.mean, torch.Tensor.mean)
def _mean(logits, dim=None, keepdim=False):
    """Return the mean of all logits, or of each token's, without gradient (for metrics)."""
    of_each = dim in (-1, logits.ndim - 1)
    if fusable(logits) is None or logits.requires_grad or not logits.numel():
        return NotImplemented
    if not (of_each or dim is None):
        return NotImplemented
    means = _means(logits, torch.promote_types(logits.dtype, torch.float32))
    if means is NotImplemented:
        return NotImplemented
    means = means.mean() if dim is None else means.unsqueeze(-1) if keepdim else means
    return means.to(logits.dtype)


def _means(logits, dtype: torch.dtype):
    """Return the mean of each token's logits; without softcap, by multiplying with the mean of the
    weight's rows."""
    transform = logits.state.transform
    if transform.softcap is not None:
        return per_token(logits, lambda z: z.to(dtype).mean(-1), dtype)
    each = transform.scale / logits.shape[-1]

    def fused(head: LinearHead):
        terms = zip(head.hidden, head.weight, strict=True)
        sums = sum(h.to(dtype) @ w.to(dtype).sum(0) for h, w in terms)
        if head.bias is not None:
            sums = sums + head.bias.to(dtype).sum()
        return ((sums if head.shard is None else head.shard.sum(sums)[0]) * each,)

    results = consume_logits(logits, fused, lambda z: (z.to(dtype).mean(-1),), shards=True)
    return NotImplemented if results is None else results[0]
