"""Cross entropy of logits, with the options that training recipes use.

For one token with logits z [V], label c, class weights w [V] (1 when absent) and

    y = softcap * tanh(scale * z / softcap)      (y = scale * z without softcap)
    lse = log(sum_v exp(y_v))

    loss = (1 - eps) * w_c * (lse - y_c)  +  eps / V * sum_v w_v * (lse - y_v)  +  z_loss * lse**2

where eps is the label smoothing (Szegedy et al., 2016, arXiv:1512.00567; the same definition as
`torch.nn.functional.cross_entropy`), z_loss the weight of the log-normaliser penalty (PaLM,
arXiv:2204.02311) and softcap the tanh bound of Gemma 2 (arXiv:2408.00118). A token whose label is
`ignore_index` has loss 0 and gradient 0; one whose label lies outside [0, V) has loss NaN.

Shapes: N tokens, V vocabulary. logits_NV in fp32, bf16 or fp16; everything inside is fp32 (fp64 for
fp64 input, torch path only). The gradient is rounded once, to the dtype of the logits.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from liger_trainer.kernels.runtime import register_op, tl, triton, use_triton


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The loss of one token; see the module's docstring for the formula."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        if not abs(self.scale) < float("inf"):  # math.isfinite does not compile in torch 2.11
            raise ValueError(f"scale must be finite, got {self.scale}")


# --- torch reference -------------------------------------------------------------------------


def transform_logits(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """y of the formula, in the dtype of `logits`."""
    if options.softcap is not None:
        return options.softcap * torch.tanh(logits * (options.scale / options.softcap))
    return logits * options.scale if options.scale != 1.0 else logits


def cross_entropy_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_V: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Loss per token [N] in fp32 (fp64 for fp64 logits), differentiable in the logits."""
    y_NV = transform_logits(logits_NV.to(_accumulate_dtype(logits_NV)), options)
    loss_N = F.cross_entropy(
        y_NV,
        labels_N,
        weight=None if class_weight_V is None else class_weight_V.to(y_NV.dtype),
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    if options.z_loss:
        penalty_N = options.z_loss * torch.logsumexp(y_NV, -1).square()
        loss_N = loss_N + penalty_N.where(labels_N != options.ignore_index, 0.0)
    return loss_N


def _accumulate_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _token_loss_torch_(logits_NV, labels_N, class_weight_V, options, want_grad):
    """`token_loss_` in plain torch, in place on `logits_NV` like the kernel."""
    y_NV = transform_logits(logits_NV.to(_accumulate_dtype(logits_NV)), options)
    ignored_N = labels_N == options.ignore_index
    valid_N = (labels_N >= 0) & (labels_N < y_NV.shape[1]) & ~ignored_N
    safe_N1 = labels_N.where(valid_N, 0).unsqueeze(1)
    eps, vocab = options.label_smoothing, y_NV.shape[1]

    lse_N1 = torch.logsumexp(y_NV, -1, keepdim=True)
    hard_N1 = torch.full_like(lse_N1, 1.0 - eps)
    total_weight = float(vocab)
    if class_weight_V is not None:
        class_weight_V = class_weight_V.to(y_NV.dtype)
        hard_N1 = hard_N1 * class_weight_V[safe_N1]
        total_weight = class_weight_V.sum()
    loss_N1 = hard_N1 * (lse_N1 - y_NV.gather(1, safe_N1)) + options.z_loss * lse_N1.square()
    if eps:
        weighted = y_NV if class_weight_V is None else y_NV * class_weight_V
        loss_N1 += eps / vocab * (total_weight * lse_N1 - weighted.sum(-1, keepdim=True))
    loss_N = loss_N1.squeeze(1).where(valid_N, math.nan).where(~ignored_N, 0.0)

    if want_grad:
        slope = hard_N1 + eps / vocab * total_weight + 2 * options.z_loss * lse_N1
        grad_NV = torch.exp(y_NV - lse_N1).mul_(slope)
        if eps:
            grad_NV -= eps / vocab * (1.0 if class_weight_V is None else class_weight_V)
        grad_NV.scatter_add_(1, safe_N1, -hard_N1)
        grad_NV *= options.scale
        if options.softcap is not None:
            grad_NV *= 1 - (y_NV / options.softcap).square()
        grad_NV.masked_fill_(ignored_N.unsqueeze(1), 0.0)
        logits_NV.copy_(grad_NV)
    return loss_N, lse_N1.squeeze(1)


# --- Triton kernels --------------------------------------------------------------------------


@triton.jit
def _transform(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    y = z * scale
    if HAS_SOFTCAP:  # tanh(u) = 2 sigmoid(2u) - 1, exact in the limits and without overflow
        y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)
    return y


@triton.jit
def _gradient(
    y, lse, cols, label, class_weight_ptr, mask, hard, smooth, total_weight, z_loss, scale, softcap,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d loss / d logits for a block of columns; `smooth` is eps / V, `hard` is (1 - eps) * w_c."""
    slope = hard + smooth * total_weight + 2.0 * z_loss * lse
    grad = tl.exp(y - lse) * slope
    if HAS_CLASS_WEIGHT:
        grad -= smooth * tl.load(class_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        grad -= smooth
    grad = tl.where(cols == label, grad - hard, grad) * scale
    if HAS_SOFTCAP:
        ratio = y / softcap
        grad *= 1.0 - ratio * ratio
    return grad


@triton.jit
def _token_loss_kernel(
    logits_ptr, row_stride, labels_ptr, class_weight_ptr, total_weight_ptr, loss_ptr, lse_ptr,
    V, ignore_index, eps, z_loss, scale, softcap,
    WRITE_GRAD: tl.constexpr, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: loss and lse; with WRITE_GRAD the logits become their gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * row_stride

    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if WRITE_GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(logits_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
        return

    top = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    smooth_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < V
        z = tl.load(logits_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)
        y = _transform(z, scale, softcap, HAS_SOFTCAP)
        y = tl.where(mask, y, -float("inf"))
        new_top = tl.maximum(top, tl.max(y, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        sums = sums * tl.exp(top - shift) + tl.exp(y - shift)
        top = new_top
        if SMOOTH:
            weighted = tl.where(mask, y, 0.0)
            if HAS_CLASS_WEIGHT:
                weighted *= tl.load(class_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            smooth_sums += weighted
    lse = top + tl.log(tl.sum(sums, 0))

    in_range = (label >= 0) & (label < V)
    safe_label = tl.where(in_range, label, 0)
    y_label = _transform(
        tl.load(logits_ptr + safe_label).to(tl.float32), scale, softcap, HAS_SOFTCAP
    )
    hard = 1.0 - eps
    total_weight = V.to(tl.float32)
    if HAS_CLASS_WEIGHT:
        hard *= tl.load(class_weight_ptr + safe_label).to(tl.float32)
        total_weight = tl.load(total_weight_ptr)
    loss = hard * (lse - y_label) + z_loss * lse * lse
    if SMOOTH:
        loss += eps / V * (total_weight * lse - tl.sum(smooth_sums, 0))
    tl.store(loss_ptr + row, tl.where(in_range, loss, float("nan")))
    tl.store(lse_ptr + row, lse)

    if WRITE_GRAD:
        tl.debug_barrier()  # y_label is read before any thread overwrites it
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < V
            z = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            y = _transform(z, scale, softcap, HAS_SOFTCAP)
            grad = _gradient(
                y, lse, cols, label, class_weight_ptr, mask, hard, eps / V, total_weight, z_loss,
                scale, softcap, HAS_CLASS_WEIGHT, HAS_SOFTCAP,
            )  # fmt: skip
            tl.store(logits_ptr + cols, grad, mask=mask)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, row_stride, labels_ptr, class_weight_ptr, total_weight_ptr, lse_ptr, dloss_ptr,
    dlogits_ptr, V, ignore_index, eps, z_loss, scale, softcap,
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
    lse = tl.load(lse_ptr + row)
    hard = 1.0 - eps
    total_weight = V.to(tl.float32)
    if HAS_CLASS_WEIGHT:
        in_range = (label >= 0) & (label < V)
        hard *= tl.load(class_weight_ptr + tl.where(in_range, label, 0)).to(tl.float32)
        total_weight = tl.load(total_weight_ptr)
    z = tl.load(logits_ptr + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = _transform(z, scale, softcap, HAS_SOFTCAP)
    grad = _gradient(
        y, lse, cols, label, class_weight_ptr, mask, hard, eps / V, total_weight, z_loss,
        scale, softcap, HAS_CLASS_WEIGHT, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(dlogits_ptr, grad * tl.load(dloss_ptr + row), mask=mask)


# --- launchers -------------------------------------------------------------------------------

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Columns and warps of a program, in place and in the two kernels of the separate operation (H200).
_IN_PLACE = (4096, 8)
_FWD = (4096, 4)
_BWD = (2048, 4)


def _block(vocab: int, largest: tuple[int, int]) -> dict[str, int]:
    """The kernel's BLOCK and num_warps; less than the largest for a small vocabulary."""
    columns, warps = largest
    block = min(columns, max(16, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, warps * block // columns)}


def _runs_in_triton(logits: torch.Tensor) -> bool:
    return logits.dtype in _TRITON_DTYPES and use_triton(logits)


def _total_weight(class_weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if class_weight is None else class_weight.float().sum()


def token_loss_(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_V: torch.Tensor | None,
    options: LossOptions,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [N], lse [N]); with `want_grad` overwrites `logits_NV` with d loss_n / d logits_n."""
    if not _runs_in_triton(logits_NV):
        return _token_loss_torch_(logits_NV, labels_N, class_weight_V, options, want_grad)
    n, vocab = logits_NV.shape
    loss_N = torch.empty(n, dtype=torch.float32, device=logits_NV.device)
    lse_N = torch.empty_like(loss_N)
    if n:
        _token_loss_kernel[(n,)](
            logits_NV, logits_NV.stride(0), labels_N, class_weight_V,
            _total_weight(class_weight_V), loss_N, lse_N, vocab, options.ignore_index,
            options.label_smoothing, options.z_loss, options.scale, options.softcap or 1.0,
            WRITE_GRAD=want_grad, SMOOTH=options.label_smoothing > 0.0,
            HAS_CLASS_WEIGHT=class_weight_V is not None,
            HAS_SOFTCAP=options.softcap is not None,
            **_block(vocab, _IN_PLACE if want_grad else _FWD),
        )  # fmt: skip
    return loss_N, lse_N


def _launch_fwd(logits, labels, class_weight, ignore_index, eps, z_loss, scale, softcap):
    options = LossOptions(ignore_index, eps, z_loss, scale, softcap)
    return token_loss_(logits, labels, class_weight, options, want_grad=False)


def _launch_bwd(
    logits, labels, class_weight, lse, dloss, ignore_index, eps, z_loss, scale, softcap
):
    n, vocab = logits.shape
    dlogits = torch.empty((n, vocab), dtype=logits.dtype, device=logits.device)
    sizes = _block(vocab, _BWD)
    if n:
        _cross_entropy_bwd_kernel[(n, triton.cdiv(vocab, sizes["BLOCK"]))](
            logits, logits.stride(0), labels, class_weight, _total_weight(class_weight), lse,
            dloss, dlogits, vocab, ignore_index, eps, z_loss, scale, softcap or 1.0,
            HAS_CLASS_WEIGHT=class_weight is not None, HAS_SOFTCAP=softcap is not None, **sizes,
        )  # fmt: skip
    return dlogits


_OPTIONS = "int ignore_index, float eps, float z_loss, float scale, float? softcap"
_cross_entropy_fwd = register_op(
    f"cross_entropy_fwd(Tensor logits, Tensor labels, Tensor? class_weight, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    _launch_fwd,
    lambda logits, labels, *_: (
        logits.new_empty(labels.shape, dtype=torch.float32),
        logits.new_empty(labels.shape, dtype=torch.float32),
    ),
)
_cross_entropy_bwd = register_op(
    "cross_entropy_bwd(Tensor logits, Tensor labels, Tensor? class_weight, Tensor lse,"
    f" Tensor dloss, {_OPTIONS}) -> Tensor",
    _launch_bwd,
    lambda logits, *_: logits.new_empty(logits.shape),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, class_weight, *options):
        loss, lse = _cross_entropy_fwd(logits, labels, class_weight, *options)
        ctx.save_for_backward(logits, labels, class_weight, lse)
        ctx.options = options
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits, labels, class_weight, lse = ctx.saved_tensors
        dlogits = _cross_entropy_bwd(
            logits, labels, class_weight, lse, dloss.contiguous(), *ctx.options
        )
        return dlogits, *[None] * (2 + len(ctx.options))


# --- public ----------------------------------------------------------------------------------

REDUCTIONS = ("none", "sum", "mean")


def check_labels(labels: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raises ValueError unless `labels` is an int64 tensor of `shape` on `device`."""
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 class indices, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device}, logits on {device}; move them together")


def reduce_loss(
    loss_N: torch.Tensor,
    reduction: str,
    count: torch.Tensor,
    token_weight_N: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Reduces per-token losses; `count` is what "mean" divides by, at least 1 (no tokens: 0)."""
    if token_weight_N is not None:
        loss_N = loss_N * token_weight_N.to(loss_N.dtype)
    if reduction == "none":
        return loss_N
    return scale_sum(loss_N.sum(), reduction, count, num_items_in_batch)


def scale_sum(total, reduction, count, num_items_in_batch):
    """Divides a summed loss by `num_items_in_batch` if given, else for "mean" by `count`."""
    if num_items_in_batch is not None:
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    return total / count if reduction == "mean" else total


def mean_denominator(
    labels_N: torch.Tensor, class_weight_V: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Supervised tokens, or the sum of their class weights; 1 where there are none."""
    supervised_N = labels_N != ignore_index
    if class_weight_V is None:
        return supervised_N.sum().clamp_min(1)
    in_range_N = supervised_N & (labels_N >= 0) & (labels_N < class_weight_V.shape[0])
    weights_N = class_weight_V.float()[labels_N.where(in_range_N, 0)].where(in_range_N, 0.0)
    total = weights_N.sum()
    return total.where(supervised_N.any(), 1.0)


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
    """Cross entropy of `logits` [..., V] with `labels` [...]; the formula heads this module.

    Args:
        logits: fp32, bf16, fp16 (fp64 on the torch path).
        labels: int64; `options.ignore_index` marks tokens without loss.
        class_weight: [V], as `weight` of `torch.nn.functional.cross_entropy`.
        token_weight: same shape as `labels`; multiplies each token's loss before the reduction.
        reduction: "none" (the shape of `labels`), "sum" or "mean". "mean" divides by the number of
            supervised tokens (by the sum of their class weights if given), whatever `token_weight`.
        num_items_in_batch: if given, the summed loss is divided by it instead (HF gradient
            accumulation).

    Returns the loss in fp32. With no supervised token it is 0, with gradient 0 (torch gives NaN).

    Raises ValueError for shapes, dtypes or devices that do not fit. A label outside [0, V) gives a
    NaN loss.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    check_labels(labels, logits.shape[:-1], logits.device)
    logits_NV = logits.reshape(-1, logits.shape[-1])
    labels_N = labels.reshape(-1)
    if _runs_in_triton(logits_NV):
        if logits_NV.stride(-1) != 1:
            logits_NV = logits_NV.contiguous()
        loss_N = _CrossEntropy.apply(
            logits_NV, labels_N.contiguous(), class_weight, *dataclasses.astuple(options)
        )
    else:
        loss_N = cross_entropy_reference(logits_NV, labels_N, class_weight, options)
    count = mean_denominator(labels_N, class_weight, options.ignore_index)
    weight_N = None if token_weight is None else token_weight.reshape(-1)
    loss = reduce_loss(loss_N, reduction, count, weight_N, num_items_in_batch)
    return loss.reshape(labels.shape) if reduction == "none" else loss
