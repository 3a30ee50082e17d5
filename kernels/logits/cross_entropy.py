"""Cross entropy of logits, with the options that training recipes use; the formula is in `loss.py`.

Shapes: N tokens, V vocabulary. logits_NV in fp32, bf16 or fp16; everything inside is fp32 (fp64 for
fp64 input, torch path only). The gradient is rounded once, to the dtype of the logits.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..autograd import first_derivative_only
from ..runtime import block_sizes, cdiv, register_op, runs_in_triton, tl, triton
from .loss import LossOptions, cross_entropy_reference
from .reduction import (
    check_labels,
    check_reduction,
    checked_weights,
    mean_denominator,
    reduce_loss,
)
from .transform import accumulate_dtype, chain, transform

# --- torch reference -------------------------------------------------------------------------


def _token_loss_torch_(logits_NV, labels_N, class_weight_V, options, want_grad):
    """Compute `token_loss_` in plain torch, in place on `logits_NV` like the kernel."""
    y_NV = options.transform(logits_NV)
    ignored_N = labels_N == options.ignore_index
    valid_N = (labels_N >= 0) & (labels_N < y_NV.shape[1]) & ~ignored_N
    safe_N1 = labels_N.where(valid_N, 0).unsqueeze(1)
    eps, vocab = options.label_smoothing, y_NV.shape[1]

    # Relative to the maximum, so that a common offset of the logits costs no precision.
    top_N1 = y_NV.amax(-1, keepdim=True)
    log_total_N1 = torch.logsumexp(y_NV - top_N1, -1, keepdim=True)
    lse_N1 = top_N1 + log_total_N1
    # NaN for a label outside [0, V), and then so are loss and gradient.
    hard_N1 = torch.full_like(lse_N1, 1.0 - eps).where(valid_N.unsqueeze(1), math.nan)
    total_weight = float(vocab)
    if class_weight_V is not None:
        class_weight_V = class_weight_V.to(y_NV.dtype)
        hard_N1 = hard_N1 * class_weight_V[safe_N1]
        total_weight = class_weight_V.sum()
    loss_N1 = hard_N1 * (log_total_N1 + (top_N1 - y_NV.gather(1, safe_N1)))
    loss_N1 += options.z_loss * lse_N1.square()
    if eps:
        weighted = y_NV - top_N1 if class_weight_V is None else (y_NV - top_N1) * class_weight_V
        loss_N1 += eps / vocab * (total_weight * log_total_N1 - weighted.sum(-1, keepdim=True))
    loss_N = loss_N1.squeeze(1).where(~ignored_N, 0.0)

    if want_grad:
        slope = hard_N1 + eps / vocab * total_weight + 2 * options.z_loss * lse_N1
        grad_NV = torch.exp(y_NV - top_N1 - log_total_N1).mul_(slope)
        if eps:
            grad_NV -= eps / vocab * (1.0 if class_weight_V is None else class_weight_V)
        grad_NV.scatter_add_(1, safe_N1, -hard_N1)
        options.transform.chain_(grad_NV, y_NV)
        grad_NV.masked_fill_(ignored_N.unsqueeze(1), 0.0)
        logits_NV.copy_(grad_NV)
    return loss_N


# --- Triton kernels --------------------------------------------------------------------------


@triton.jit
def _gradient(
    log_p, y, lse, cols, label, class_weight_ptr, mask, hard, smooth, total_weight, z_loss, scale,
    softcap,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return d loss / d logits of a block of columns; smooth = eps / V, hard = (1 - eps) * w_c."""
    slope = hard + smooth * total_weight + 2.0 * z_loss * lse
    grad = tl.exp(log_p) * slope
    if HAS_CLASS_WEIGHT:
        grad -= smooth * tl.load(class_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        grad -= smooth
    grad = tl.where(cols == label, grad - hard, grad)
    return chain(grad, y, scale, softcap, HAS_SOFTCAP)


@triton.jit
def _token_loss_kernel(
    logits_ptr, row_stride, labels_ptr, class_weight_ptr, total_weight_ptr, loss_ptr, top_ptr,
    log_total_ptr, V, ignore_index, eps, z_loss, scale, softcap,
    WRITE_GRAD: tl.constexpr, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one token's loss. Overwrite its logits with their gradient, or keep its sums.

    With WRITE_GRAD, the logits become d loss / d logits. Else top = max(y) and
    log_total = log(sum(exp(y - top))) are kept for backward: apart, as their sum would be rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * row_stride

    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WRITE_GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
        return

    in_range = (label >= 0) & (label < V)
    safe_label = tl.where(in_range, label, 0)
    y_label = transform(
        tl.load(logits_ptr + safe_label).to(tl.float32), scale, softcap, HAS_SOFTCAP
    )
    origin = tl.where(y_label == -float("inf"), 0.0, y_label)
    top = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    smooth_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < V
        z = tl.load(logits_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)
        y = transform(z, scale, softcap, HAS_SOFTCAP)
        y = tl.where(mask, y, -float("inf"))
        new_top = tl.maximum(top, tl.max(y, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        sums = sums * tl.exp(top - shift) + tl.exp(y - shift)
        top = new_top
        if SMOOTH:
            weighted = tl.where(mask, y - origin, 0.0)
            if HAS_CLASS_WEIGHT:
                weighted *= tl.load(class_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            smooth_sums += weighted
    log_total = tl.log(tl.sum(sums, 0))
    lse = top + log_total
    # NaN for a label outside [0, V), and then so are loss and gradient.
    hard = tl.where(in_range, 1.0 - eps, float("nan"))
    total_weight = tl.cast(V, tl.float32)
    if HAS_CLASS_WEIGHT:
        hard *= tl.load(class_weight_ptr + safe_label).to(tl.float32)
        total_weight = tl.load(total_weight_ptr)
    # Differences of logits, so that a common offset costs no precision.
    loss = hard * (log_total + (top - y_label)) + z_loss * lse * lse
    if SMOOTH:
        loss += eps / V * (total_weight * (log_total + (top - origin)) - tl.sum(smooth_sums, 0))
    tl.store(loss_ptr + row, loss)

    if WRITE_GRAD:
        tl.debug_barrier()  # so that no thread overwrites the label's logit before it is read
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < V
            z = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            y = transform(z, scale, softcap, HAS_SOFTCAP)
            grad = _gradient(
                y - top - log_total, y, lse, cols, label, class_weight_ptr, mask, hard, eps / V,
                total_weight, z_loss, scale, softcap, HAS_CLASS_WEIGHT, HAS_SOFTCAP,
            )  # fmt: skip
            tl.store(logits_ptr + cols, grad, mask=mask)
    else:
        tl.store(top_ptr + row, top)
        tl.store(log_total_ptr + row, log_total)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, row_stride, labels_ptr, class_weight_ptr, total_weight_ptr, top_ptr, log_total_ptr,
    dloss_ptr, dlogits_ptr, V, ignore_index, eps, z_loss, scale, softcap,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < V
    label = tl.load(labels_ptr + row)
    dlogits_ptr += row * V + cols
    if label == ignore_index:
        tl.store(dlogits_ptr, tl.zeros([BLOCK], tl.float32), mask=mask)
        return
    top = tl.load(top_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    in_range = (label >= 0) & (label < V)
    hard = tl.where(in_range, 1.0 - eps, float("nan"))
    total_weight = tl.cast(V, tl.float32)
    if HAS_CLASS_WEIGHT:
        hard *= tl.load(class_weight_ptr + tl.where(in_range, label, 0)).to(tl.float32)
        total_weight = tl.load(total_weight_ptr)
    z = tl.load(logits_ptr + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = transform(z, scale, softcap, HAS_SOFTCAP)
    grad = _gradient(
        y - top - log_total, y, top + log_total, cols, label, class_weight_ptr, mask, hard, eps / V,
        total_weight, z_loss, scale, softcap, HAS_CLASS_WEIGHT, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(dlogits_ptr, grad * tl.load(dloss_ptr + row), mask=mask)


# --- launchers -------------------------------------------------------------------------------

# Columns and warps of a program: with the gradient in place, without it, and of backward (H200).
_IN_PLACE = (4096, 8)
_FWD = (4096, 4)
_BWD = (2048, 4)


def _total_weight(class_weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if class_weight is None else class_weight.float().sum()


def token_loss_(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_V: torch.Tensor | None,
    options: LossOptions,
    want_grad: bool,
) -> torch.Tensor:
    """Return the loss [N]; `want_grad` overwrites `logits_NV` with d loss_n / d logits_n."""
    if not runs_in_triton(logits_NV):
        return _token_loss_torch_(logits_NV, labels_N, class_weight_V, options, want_grad)
    loss_N = torch.empty(labels_N.shape, dtype=torch.float32, device=logits_NV.device)
    sums = (None, None) if want_grad else (torch.empty_like(loss_N), torch.empty_like(loss_N))
    _launch_token_loss(logits_NV, labels_N, class_weight_V, options, loss_N, *sums)
    return loss_N


def _launch_token_loss(logits_NV, labels_N, class_weight_V, options, loss_N, top_N, log_total_N):
    n, vocab = logits_NV.shape
    want_grad = top_N is None
    scale, softcap, has_softcap = options.transform.arguments
    if n:
        _token_loss_kernel[(n,)](
            logits_NV, logits_NV.stride(0), labels_N, class_weight_V,
            _total_weight(class_weight_V), loss_N, top_N, log_total_N, vocab, options.ignore_index,
            options.label_smoothing, options.z_loss, scale, softcap,
            WRITE_GRAD=want_grad, SMOOTH=options.label_smoothing > 0.0,
            HAS_CLASS_WEIGHT=class_weight_V is not None, HAS_SOFTCAP=has_softcap,
            **block_sizes(vocab, _IN_PLACE if want_grad else _FWD),
        )  # fmt: skip


def _launch_fwd(logits, labels, class_weight, ignore_index, eps, z_loss, scale, softcap):
    options = LossOptions(ignore_index, eps, z_loss, scale, softcap)
    found = tuple(logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))
    _launch_token_loss(logits, labels, class_weight, options, *found)
    return found  # loss, top, log_total


def _launch_bwd(
    logits, labels, class_weight, top, log_total, dloss, ignore_index, eps, z_loss, scale, softcap
):
    n, vocab = logits.shape
    dlogits = torch.empty((n, vocab), dtype=logits.dtype, device=logits.device)
    sizes = block_sizes(vocab, _BWD)
    if n:
        _cross_entropy_bwd_kernel[(n, cdiv(vocab, sizes["BLOCK"]))](
            logits, logits.stride(0), labels, class_weight, _total_weight(class_weight), top,
            log_total, dloss, dlogits, vocab, ignore_index, eps, z_loss, scale, softcap or 1.0,
            HAS_CLASS_WEIGHT=class_weight is not None, HAS_SOFTCAP=softcap is not None, **sizes,
        )  # fmt: skip
    return dlogits


_OPTIONS = "int ignore_index, float eps, float z_loss, float scale, float? softcap"
_cross_entropy_fwd = register_op(
    f"cross_entropy_fwd(Tensor logits, Tensor labels, Tensor? class_weight, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _launch_fwd,
    lambda logits, labels, *_: tuple(
        logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(3)
    ),
)
_cross_entropy_bwd = register_op(
    "cross_entropy_bwd(Tensor logits, Tensor labels, Tensor? class_weight, Tensor top,"
    f" Tensor log_total, Tensor dloss, {_OPTIONS}) -> Tensor",
    _launch_bwd,
    lambda logits, *_: logits.new_empty(logits.shape),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, class_weight, *options):
        loss, top, log_total = _cross_entropy_fwd(logits, labels, class_weight, *options)
        ctx.save_for_backward(logits, labels, class_weight, top, log_total)
        ctx.options = options
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        dlogits = _cross_entropy_bwd(*ctx.saved_tensors, dloss.contiguous(), *ctx.options)
        return dlogits, *[None] * (2 + len(ctx.options))


# --- public ----------------------------------------------------------------------------------


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | int | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Return the cross entropy of `logits` with `labels`; the formula is in `loss.py`.

    Args:
        logits: [..., V], fp32, bf16, fp16 (fp64 on the torch path).
        labels: [...], int64; `options.ignore_index` marks tokens without loss.
        class_weight: [V], as `weight` of `torch.nn.functional.cross_entropy`.
        token_weight: same shape as `labels`; multiplies each token's loss before the reduction.
        reduction: "none" (the shape of `labels`), "sum" or "mean". "mean" divides by the number of
            supervised tokens (by the sum of their class weights if given), not by token weights.
        num_items_in_batch: if given, the summed loss is divided by it instead (HF gradient
            accumulation); refused with "none".

    Returns the loss in fp32. With no supervised token it is 0, with gradient 0 (torch gives NaN).

    Raises ValueError if shapes, dtypes or devices do not fit. A label outside [0, V) gives a NaN
    loss and gradient (IndexError on the torch path, as in torch).
    """
    check_reduction(reduction, num_items_in_batch)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    check_labels(labels, logits.shape[:-1], logits.device)
    class_weight, weight_N = checked_weights(
        class_weight, token_weight, labels, logits.shape[-1], options.ignore_index,
        accumulate_dtype(logits),
    )  # fmt: skip
    logits_NV = logits.reshape(-1, logits.shape[-1])
    labels_N = labels.reshape(-1)
    if runs_in_triton(logits_NV):
        if logits_NV.stride(-1) != 1:
            logits_NV = logits_NV.contiguous()
        loss_N = _CrossEntropy.apply(
            logits_NV, labels_N.contiguous(), class_weight, *dataclasses.astuple(options)
        )
    else:
        loss_N = cross_entropy_reference(logits_NV, labels_N, class_weight, options)
    count = mean_denominator(labels_N, class_weight, options.ignore_index)
    loss = reduce_loss(loss_N, reduction, count, weight_N, num_items_in_batch)
    return loss.reshape(labels.shape) if reduction == "none" else loss
