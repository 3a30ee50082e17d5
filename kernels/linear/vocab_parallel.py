"""A head whose vocabulary is split over ranks: each computes with its own rows of the weight.

    rank r holds weight_r [V_r, H] and bias_r [V_r]; all have the same hidden states and labels
    z_r = hidden @ weight_r^T + bias_r                             [N, V_r]
    top = max over ranks of max_v y_v                              one all-reduce
    sum_v exp(y_v - top), y_label - top, ...                       one all-reduce of their stack

Every sum over the vocabulary is a sum over ranks of local sums; y and the formulas of loss and
scores are those of `loss.py` and `scores.py`. So ranks exchange a few numbers per token, but
neither logits nor weights. d weight and d bias are complete on each rank. d hidden is this rank's
part: the caller sums it over the ranks, once. The three GEMMs have V / p columns each.

Every rank of the group must make the same calls with the same hidden states, labels and options:
the number of rows in a workspace follows from the largest shard, so that they match.

Legend: N tokens, V vocabulary, V_r rows of rank r, p ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..logits import cross_entropy, log_probs
from ..logits.loss import LossOptions
from ..logits.scores import Normalizer, ScoreGradients, ScoreOptions, TokenScores
from ..logits.transform import Transform, accumulate_dtype

_PIECE = 1 << 24
"""How many logits are processed in fp32 at once: 64 MiB."""

_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """Which rows of a head's weight this rank holds."""

    group: dist.ProcessGroup
    vocab: int  # V, the rows of all ranks
    start: int  # the first row of this rank
    largest: int  # rows of the largest shard; only the last shard may have fewer

    @classmethod
    def even(cls, group: dist.ProcessGroup, vocab: int) -> VocabShard:
        """Return this rank's shard of ceil(V / p) rows, as DTensor splits them.

        Raise ValueError if a rank would have none.
        """
        ranks = dist.get_world_size(group)
        rows = math.ceil(vocab / ranks)
        if rows * (ranks - 1) >= vocab:
            raise ValueError(f"{vocab} rows of a weight do not reach {ranks} ranks")
        return cls(group, vocab, rows * dist.get_rank(group), rows)

    @property
    def rows(self) -> int:
        return min(self.largest, self.vocab - self.start)

    def local(self, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (labels relative to this rank's first row, 0 if it does not have them; whether it
        has them)."""
        own_N = (labels_N >= self.start) & (labels_N < self.start + self.rows)
        return (labels_N - self.start).where(own_N, 0), own_N

    def all_reduce(self, values: torch.Tensor, op) -> torch.Tensor:
        """Reduce `values` over the ranks in place, and return them."""
        dist.all_reduce(values, op=op, group=self.group)
        return values

    def sum(self, *rows_N: torch.Tensor) -> torch.Tensor:
        """Return each of `rows_N` summed over the ranks, in one message."""
        return self.all_reduce(torch.stack(rows_N), dist.ReduceOp.SUM)


def _kinds(labels_N, ignore_index: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks [N] of the supervised tokens, and of those whose label is inside [0, V)."""
    supervised_N = labels_N != ignore_index
    return supervised_N, supervised_N & (labels_N >= 0) & (labels_N < shard.vocab)


# --- cross entropy ---------------------------------------------------------------------------


class _Weights(NamedTuple):
    """The factors that class weights (default 1) and label smoothing (eps) put on the loss."""

    hard: torch.Tensor  # [N], (1 - eps) * w of the label
    smooth: torch.Tensor | float  # [V_r], eps / V * w_v, of this rank's rows
    smooth_own: torch.Tensor | float  # their sum
    smooth_all: torch.Tensor | float  # the sum over all ranks

    @classmethod
    def of(cls, labels_N, valid_N, class_weight_V, eps: float, shard, dtype) -> _Weights:
        hard_N = torch.full(labels_N.shape, 1.0 - eps, dtype=dtype, device=labels_N.device)
        smooth = eps / shard.vocab
        if class_weight_V is None:
            return cls(hard_N, smooth, smooth * shard.rows, eps)
        weight_V = class_weight_V.to(dtype)
        own_V = weight_V[shard.start : shard.start + shard.rows]
        hard_N = hard_N * weight_V[labels_N.where(valid_N, 0)]
        return cls(hard_N, smooth * own_V, smooth * own_V.sum(), smooth * weight_V.sum())


def token_loss_(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, class_weight_V: torch.Tensor | None,
    options: LossOptions, want_grad: bool, shard: VocabShard | None,
) -> torch.Tensor:  # fmt: skip
    """Return the loss [N]; with `want_grad`, overwrite the (local) logits with their gradient.

    The logits of a shard are processed in fp32, a limited number of rows at a time.
    """
    if shard is None:
        return cross_entropy.token_loss_(logits_NV, labels_N, class_weight_V, options, want_grad)
    supervised_N, valid_N = _kinds(labels_N, options.ignore_index, shard)
    label_N, own_N = shard.local(labels_N)
    dtype = accumulate_dtype(logits_NV)
    weights = _Weights.of(labels_N, valid_N, class_weight_V, options.label_smoothing, shard, dtype)
    sums = [
        _local_sums(options.transform(logits_NV[piece]), label_N[piece], weights.smooth)
        for piece in _pieces(logits_NV)
    ]
    own_top_N, total_N, picked_N, smooth_N = map(torch.cat, zip(*sums, strict=True))
    top_N = shard.all_reduce(own_top_N.clone(), dist.ReduceOp.MAX)
    if options.label_smoothing:
        smooth_N = smooth_N + weights.smooth_own * (own_top_N - top_N)
    total_N, picked_N, smooth_N = shard.sum(
        _rescaled(total_N, own_top_N - top_N),
        (picked_N - top_N).where(own_N, 0.0),
        smooth_N,
    )
    # Relative to the maximum, so that a common offset of the logits costs no precision.
    log_total_N = total_N.log()
    lse_N = top_N + log_total_N
    loss_N = weights.hard * (log_total_N - picked_N) + options.z_loss * lse_N.square()
    if options.label_smoothing:
        loss_N = loss_N + (weights.smooth_all * log_total_N - smooth_N)
    if want_grad:
        slope_N = weights.hard + weights.smooth_all + 2 * options.z_loss * lse_N
        at_label_N = -weights.hard.where(own_N, 0.0)
        for piece in _pieces(logits_NV):
            y_nV = options.transform(logits_NV[piece])
            grad_nV = torch.exp(y_nV - top_N[piece, None] - log_total_N[piece, None])
            grad_nV = grad_nV.mul_(slope_N[piece, None]).sub_(weights.smooth)
            grad_nV.scatter_add_(1, label_N[piece, None], at_label_N[piece, None])
            options.transform.chain_(grad_nV, y_nV)
            logits_NV[piece] = grad_nV.masked_fill_(~supervised_N[piece, None], 0.0)
    return loss_N.where(valid_N, math.nan).where(supervised_N, 0.0)


def _pieces(logits_NV: torch.Tensor) -> list[slice]:
    rows = max(1, _PIECE // logits_NV.shape[1])
    return [slice(start, start + rows) for start in range(0, max(len(logits_NV), 1), rows)]


def _local_sums(y_nV: torch.Tensor, label_n: torch.Tensor, smooth_V) -> tuple[torch.Tensor, ...]:
    """Return (maximum, sum of exponentials relative to it, y of the label, sum of smooth_v * y_v
    relative to it)."""
    top_n = y_nV.amax(-1)
    picked_n = y_nV.gather(1, label_n[:, None]).squeeze(1)
    below_nV = y_nV - top_n.masked_fill(top_n == -math.inf, 0.0)[:, None]
    smooth_n = torch.zeros_like(top_n)
    if torch.is_tensor(smooth_V) or smooth_V:
        smooth_n = (below_nV * smooth_V).sum(-1)
    return top_n, below_nV.exp_().sum(-1), picked_n, smooth_n


def _rescaled(total_N: torch.Tensor, shift_N: torch.Tensor) -> torch.Tensor:
    """Return sums of exponentials relative to the maximum of all ranks instead of the local one."""
    return (total_N * shift_N.exp()).where(total_N != 0, 0.0)


# --- scores ----------------------------------------------------------------------------------


def score(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, options: ScoreOptions, wanted: Sequence[str],
    shard: VocabShard | None,
) -> tuple[TokenScores, Normalizer]:  # fmt: skip
    """Return what `kernels.logits.log_probs.score` does, combined over the ranks of a shard.

    With lse_r and entropy_r of rank r's logits alone, w_r = exp(lse_r - top), W = sum_r w_r:

        log_sum_exp  = top + log W
        entropy      = sum_r w_r / W (entropy_r - (lse_r - top)) + log W
    """
    if shard is None:
        return log_probs.score(logits_NV, labels_N, options, wanted)
    supervised_N, valid_N = _kinds(labels_N, options.ignore_index, shard)
    label_N, own_N = shard.local(labels_N)
    options = dataclasses.replace(options, ignore_index=_IGNORED)
    local = [name for name in wanted if name not in ("argmax", "is_top1")]
    if len(local) < len(wanted):
        local.append("argmax")
    label_N = label_N.where(supervised_N, _IGNORED)
    own, (own_top_N, own_log_total_N) = log_probs.score(logits_NV, label_N, options, local)

    top_N = shard.all_reduce(own_top_N.clone(), dist.ReduceOp.MAX)
    # A rank whose logits are all -inf has no distribution of its own: its scores are NaN.
    possible_N = own_top_N != -math.inf
    shift_N = (own_top_N - top_N + own_log_total_N).where(possible_N, -math.inf)
    weight_N = shift_N.exp()
    terms = [
        weight_N,
        (own.log_probs + shift_N).where(possible_N, -math.inf).where(own_N, 0.0),
    ]
    if own.entropy is not None:
        terms.append((weight_N * (own.entropy - shift_N)).where(weight_N > 0, 0.0))
    if own.log_sum_sq_probs is not None:
        terms.append((own.log_sum_sq_probs + 2 * shift_N).exp().where(possible_N, 0.0))
    if own.mean_logits is not None:
        terms.append(own.mean_logits * (shard.rows / shard.vocab))
    total_N, picked_N, *others = shard.sum(*terms)
    others, log_total_N = iter(others), total_N.log()

    def supervised(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.where(supervised_N, torch.zeros_like(values_N))

    normalizer = Normalizer(top_N, log_total_N)
    found = {"log_probs": (picked_N - log_total_N).where(valid_N, math.nan)}
    if "log_sum_exp" in wanted:
        found["log_sum_exp"] = normalizer.log_sum_exp
    if own.entropy is not None:
        found["entropy"] = next(others) / total_N + log_total_N
    if own.log_sum_sq_probs is not None:
        found["log_sum_sq_probs"] = next(others).log() - 2 * log_total_N
    if own.mean_logits is not None:
        found["mean_logits"] = next(others)
    if own.argmax is not None:
        argmax_N = _global_argmax(shard, logits_NV, own.argmax, options.transform)
        if "argmax" in wanted:
            found["argmax"] = argmax_N
        if "is_top1" in wanted:
            found["is_top1"] = argmax_N == labels_N
    scores = TokenScores(**{name: supervised(values_N) for name, values_N in found.items()})
    return scores, normalizer


def _global_argmax(shard: VocabShard, logits_NV, argmax_N, transform: Transform):
    """Return the smallest index of the largest y over all ranks, from this rank's `argmax_N`.

    As in torch, NaN is the largest.
    """
    best_N = transform(logits_NV.gather(1, argmax_N[:, None])).squeeze(1)
    best_of_all_N = shard.all_reduce(best_N.clone(), dist.ReduceOp.MAX)
    is_best_N = (best_N == best_of_all_N) | best_N.isnan()
    index_N = (argmax_N + shard.start).where(is_best_N, shard.vocab)
    return shard.all_reduce(index_N, dist.ReduceOp.MIN)


def score_gradient_(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, normalizer: Normalizer,
    entropy_N: torch.Tensor | None, grads: ScoreGradients, options: ScoreOptions,
    shard: VocabShard | None,
) -> None:  # fmt: skip
    """Overwrite the logits with their gradient; only the rank that has the label adds its term."""
    if shard is not None:
        supervised_N, valid_N = _kinds(labels_N, options.ignore_index, shard)
        labels_N, own_N = shard.local(labels_N)
        labels_N = labels_N.where(supervised_N, _IGNORED)
        options = dataclasses.replace(options, ignore_index=_IGNORED)
        g_N = grads.log_probs.where(valid_N | ~supervised_N, math.nan)
        along_lse_N = torch.where(own_N, 0.0, -g_N)
        if grads.log_sum_exp is not None:
            along_lse_N = along_lse_N + grads.log_sum_exp
        grads = ScoreGradients(g_N.where(own_N, 0.0), grads.entropy, along_lse_N)
    log_probs.score_gradient_(logits_NV, labels_N, normalizer, entropy_N, grads, options)
