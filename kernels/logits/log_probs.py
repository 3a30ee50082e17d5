"""Log-probabilities of labels, and further scores of each token, from logits.

Formulas, options and shapes are in `scores.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..autograd import first_derivative_only
from ..runtime import block_sizes, cdiv, on_device, runs_in_triton, tl, triton
from .reduction import check_labels
from .scores import (
    Normalizer,
    ScoreGradients,
    ScoreOptions,
    TokenScores,
    check_outputs,
    log_probs_reference,
    scores_and_normalizer,
)
from .transform import chain, transform

# --- torch path of the gradient ----------------------------------------------------------------


def _gradient_torch_(logits_NV, labels_N, normalizer, entropy_N, grads: ScoreGradients, options):
    """Compute `score_gradient_` in plain torch, in place like the kernel."""
    y_NV = options.transform(logits_NV)
    logp_NV = normalizer.log_p(y_NV)
    p_NV = logp_NV.exp()
    slope_N = -grads.log_probs
    if grads.log_sum_exp is not None:
        slope_N = slope_N + grads.log_sum_exp
    grad_NV = p_NV * slope_N.unsqueeze(1)
    if grads.entropy is not None:
        centered_NV = (logp_NV + entropy_N.unsqueeze(1)).masked_fill(p_NV == 0, 0.0)
        grad_NV -= p_NV * centered_NV * grads.entropy.unsqueeze(1)
    valid_N = (labels_N >= 0) & (labels_N < logits_NV.shape[1])
    label_N1 = labels_N.where(valid_N, 0).unsqueeze(1)
    grad_NV.scatter_add_(1, label_N1, grads.log_probs.where(valid_N, math.nan).unsqueeze(1))
    options.transform.chain_(grad_NV, y_NV)
    grad_NV.masked_fill_((labels_N == options.ignore_index).unsqueeze(1), 0.0)
    logits_NV.copy_(grad_NV)


# --- Triton kernels --------------------------------------------------------------------------


@triton.jit
def _score_kernel(
    logits_ptr, row_stride, labels_ptr, log_prob_ptr, top_ptr, log_total_ptr, entropy_ptr,
    square_ptr, mean_ptr, argmax_ptr, V, ignore_index, scale, softcap,
    ENTROPY: tl.constexpr, SQUARE: tl.constexpr, MEAN: tl.constexpr, ARGMAX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score one token in one pass over its logits; sums are relative to the running maximum."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * row_stride
    if label == ignore_index:
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(top_ptr + row, 0.0)
        tl.store(log_total_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if SQUARE:
            tl.store(square_ptr + row, 0.0)
        if MEAN:
            tl.store(mean_ptr + row, 0.0)
        if ARGMAX:
            tl.store(argmax_ptr + row, tl.zeros([], tl.int64))
        return

    top = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)  # exp(y - top)
    weighted = tl.zeros([BLOCK], tl.float32)  # exp(y - top) * (y - top)
    squares = tl.zeros([BLOCK], tl.float32)  # exp(y - top)^2
    plain = tl.zeros([BLOCK], tl.float32)  # y
    y_label = tl.full([BLOCK], -float("inf"), tl.float32)  # y of the label, in its lane
    best = tl.full([BLOCK], -float("inf"), tl.float32)  # largest y of each lane, and its column
    best_at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < V
        z = tl.load(logits_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)
        y = tl.where(mask, transform(z, scale, softcap, HAS_SOFTCAP), -float("inf"))
        new_top = tl.maximum(top, tl.max(y, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        step = tl.where(top == -float("inf"), 0.0, top - shift)
        decay = tl.where(top == -float("inf"), 0.0, tl.exp(step))
        e = tl.exp(y - shift)
        if ENTROPY:
            centered = tl.where(e > 0.0, y - shift, 0.0)
            weighted = decay * (weighted + step * sums) + e * centered
        sums = sums * decay + e
        if SQUARE:
            squares = squares * decay * decay + e * e
        if MEAN:
            plain += tl.where(mask, y, 0.0)
        if ARGMAX:
            better = y > best
            best = tl.where(better, y, best)
            best_at = tl.where(better, cols, best_at)
        y_label = tl.where(cols == label, y, y_label)
        top = new_top
    total = tl.sum(sums, 0)
    log_total = tl.log(total)
    in_range = (label >= 0) & (label < V)
    log_prob = tl.max(y_label, 0) - top - log_total  # this order is exact for a common offset
    tl.store(log_prob_ptr + row, tl.where(in_range, log_prob, float("nan")))
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_total - tl.sum(weighted, 0) / total)
    if SQUARE:
        tl.store(square_ptr + row, tl.log(tl.sum(squares, 0)) - 2.0 * log_total)
    if MEAN:
        tl.store(mean_ptr + row, tl.sum(plain, 0) / V)
    if ARGMAX:
        first = tl.min(tl.where(best == top, best_at, V), 0)
        tl.store(argmax_ptr + row, first.to(tl.int64))


@triton.jit
def _score_gradient_kernel(
    logits_ptr, row_stride, labels_ptr, top_ptr, log_total_ptr, entropy_ptr, g_log_prob_ptr,
    g_entropy_ptr, g_lse_ptr, V, ignore_index, scale, softcap,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the logits of a block of one token's columns with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < V
    logits_ptr += row * row_stride + cols
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(logits_ptr, tl.zeros([BLOCK], tl.float32), mask=mask)
        return
    g = tl.load(g_log_prob_ptr + row)
    g = tl.where((label >= 0) & (label < V), g, float("nan"))
    slope = -g
    if LSE:
        slope += tl.load(g_lse_ptr + row)
    z = tl.load(logits_ptr, mask=mask, other=-float("inf")).to(tl.float32)
    y = transform(z, scale, softcap, HAS_SOFTCAP)
    logp = y - tl.load(top_ptr + row) - tl.load(log_total_ptr + row)
    p = tl.exp(logp)
    grad = p * slope
    if ENTROPY:
        centered = tl.where(p > 0.0, logp + tl.load(entropy_ptr + row), 0.0)
        grad -= p * centered * tl.load(g_entropy_ptr + row)
    grad = tl.where(cols == label, grad + g, grad)
    grad = chain(grad, y, scale, softcap, HAS_SOFTCAP)
    tl.store(logits_ptr, grad, mask=mask)


# --- launchers -------------------------------------------------------------------------------

# Columns and warps of a program (H200).
_SCORE = (2048, 4)
_GRADIENT = (2048, 4)


def score(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    options: ScoreOptions,
    outputs: Sequence[str],
) -> tuple[TokenScores, Normalizer]:
    """Return `log_probs` and `outputs`, without autograd, and what `score_gradient_` needs.

    Only reads the logits.
    """
    if not runs_in_triton(logits_NV):
        with torch.no_grad():
            return scores_and_normalizer(logits_NV, labels_N, options, outputs)
    n, vocab = logits_NV.shape
    scale, softcap, has_softcap = options.transform.arguments
    wants_argmax = not {"argmax", "is_top1"}.isdisjoint(outputs)

    def per_token(wanted: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(n, dtype=dtype, device=logits_NV.device) if wanted else None

    log_prob_N, top_N, log_total_N = (per_token(True) for _ in range(3))
    entropy_N = per_token("entropy" in outputs)
    square_N = per_token("log_sum_sq_probs" in outputs)
    mean_N = per_token("mean_logits" in outputs)
    argmax_N = per_token(wants_argmax, torch.int64)
    if n:
        _score_kernel[(n,)](
            logits_NV, logits_NV.stride(0), labels_N, log_prob_N, top_N, log_total_N, entropy_N,
            square_N, mean_N, argmax_N, vocab, options.ignore_index, scale, softcap,
            ENTROPY=entropy_N is not None, SQUARE=square_N is not None, MEAN=mean_N is not None,
            ARGMAX=wants_argmax, HAS_SOFTCAP=has_softcap, **block_sizes(vocab, _SCORE),
        )  # fmt: skip
    is_top1_N = None
    if "is_top1" in outputs:
        is_top1_N = (argmax_N == labels_N) & (labels_N != options.ignore_index)
    normalizer = Normalizer(top_N, log_total_N)
    scores = TokenScores(
        log_prob_N, entropy_N, normalizer.log_sum_exp if "log_sum_exp" in outputs else None,
        square_N, mean_N, argmax_N if "argmax" in outputs else None, is_top1_N,
    )  # fmt: skip
    return scores, normalizer


def score_gradient_(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    normalizer: Normalizer,
    entropy_N: torch.Tensor | None,
    grads: ScoreGradients,
    options: ScoreOptions,
) -> None:
    """Overwrite `logits_NV` with its gradient, given the gradients of the scores.

    `entropy_N` is needed if its gradient is given.
    """
    if not runs_in_triton(logits_NV):
        _gradient_torch_(logits_NV, labels_N, normalizer, entropy_N, grads, options)
        return
    n, vocab = logits_NV.shape
    scale, softcap, has_softcap = options.transform.arguments
    sizes = block_sizes(vocab, _GRADIENT)
    if n:
        _score_gradient_kernel[(n, cdiv(vocab, sizes["BLOCK"]))](
            logits_NV, logits_NV.stride(0), labels_N, *normalizer, entropy_N, grads.log_probs,
            grads.entropy, grads.log_sum_exp, vocab, options.ignore_index, scale, softcap,
            ENTROPY=grads.entropy is not None, LSE=grads.log_sum_exp is not None,
            HAS_SOFTCAP=has_softcap, **sizes,
        )  # fmt: skip


# --- autograd and public ---------------------------------------------------------------------


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, options, outputs):
        with on_device(logits):
            scores, normalizer = score(logits, labels, options, outputs)
        ctx.save_for_backward(logits, labels, scores.entropy, *normalizer)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*scores.constants)
        return tuple(scores)

    @staticmethod
    @first_derivative_only
    def backward(ctx, g_log_probs, g_entropy, g_lse, *_):
        logits, labels, entropy, *normalizer = ctx.saved_tensors
        normalizer = Normalizer(*normalizer)
        if g_log_probs is None:
            g_log_probs = torch.zeros_like(normalizer.top)
        grads = ScoreGradients(
            *(None if g is None else g.contiguous() for g in (g_log_probs, g_entropy, g_lse))
        )
        dlogits = logits.clone()
        with on_device(logits):
            score_gradient_(dlogits, labels, normalizer, entropy, grads, ctx.options)
        return dlogits, None, None, None


def log_probs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    outputs: Sequence[str] = (),
    options: ScoreOptions = ScoreOptions(),
) -> TokenScores:
    """Return the log-probability of each label, and `outputs`; the formulas are in `scores.py`.

    Args:
        logits: [..., V] in fp32, bf16, fp16 (fp64 on the torch path).
        labels: [...], int64; `options.ignore_index` marks tokens without a label, whose scores are
            0.
        outputs: further fields of `TokenScores` to fill, out of `scores.EXTRA`; each costs some
            arithmetic, but no further pass over the logits.

    Returns `TokenScores` in fp32, each field of the shape of `labels`. Gradients flow from
    log_probs, entropy and log_sum_exp.

    Raises ValueError for an unknown output, and if shapes, dtypes or devices do not fit. A label
    outside [0, V) gives a NaN log-probability.
    """
    outputs = check_outputs(outputs)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    check_labels(labels, logits.shape[:-1], logits.device)
    logits_NV = logits.reshape(-1, logits.shape[-1])
    labels_N = labels.reshape(-1).contiguous()
    if runs_in_triton(logits_NV):
        if logits_NV.stride(-1) != 1:
            logits_NV = logits_NV.contiguous()
        scores = TokenScores(*_LogProbs.apply(logits_NV, labels_N, options, outputs))
    else:
        scores = log_probs_reference(logits_NV, labels_N, options, outputs)
    return scores.reshape(labels.shape)
