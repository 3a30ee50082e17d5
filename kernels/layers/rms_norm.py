"""RMSNorm: y = (offset + weight) * xhat, with xhat = x * rstd and rstd = 1 / sqrt(mean(x^2) + eps).

Shapes: x, y [..., H]; weight [H]; rstd [...], fp32. In kernels R is rows, H the normalized width.
Dtypes: x and weight are fp32, bf16 or fp16 each; all arithmetic is fp32 (fp64 on the torch path).

Backward, with g = dy * (offset + weight):
    dx = rstd * (g - xhat * mean(g * xhat)),    dweight = sum over rows of dy * xhat

Forward keeps x, weight and rstd, never xhat. Backward is persistent: each program walks over rows,
keeps its part of dweight in registers, and writes one row of fp32 partials, which torch sums.

Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..launch import launch
from ..recompute import by_torch, recomputable
from ..runtime import as_rows, cdiv, num_sms, pays, register_op, tl, triton
from ..second_derivative import twice_differentiable
from .norm import (
    FWD_TILES,
    MAX_H,
    MIN_ELEMENTS,
    check_input,
    has_kernel,
    tile,
)

# As FWD_TILES, then: programs per SM (as many as the registers of sm_90 allow), pipeline stages,
# and whether weight stays in registers; where they have no room besides x, dy and the partial of
# dweight, it is read from L1. Rows wider than 16384 spill registers: correct but slow, and no model
# is that wide.
_BWD_TILES = (
    (1024, 2048, 4, 5, 1, True),
    (2048, 2048, 4, 8, 1, False),
    (4096, 4096, 8, 3, 1, True),
    (8192, 8192, 16, 2, 1, False),
    (16384, 16384, 32, 1, 1, False),
    (MAX_H, 16384, 32, 1, 1, False),
)


def rms_norm_reference(x, weight=None, *, eps, offset=0.0, cast_first=True):
    """Compute `rms_norm` in differentiable torch, in fp32 (in fp64 for fp64 input)."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    xhat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return xhat.to(x.dtype)
    if cast_first:
        return (offset + weight if offset else weight) * xhat.to(x.dtype)
    return ((offset + weight.to(xhat.dtype)) * xhat).to(x.dtype)


@triton.jit
def _load_scale(weight_ptr, offset, col, H, CAST_FIRST: tl.constexpr, EVEN_H: tl.constexpr):
    """Return offset + weight [1, BLOCK_H] in fp32; CAST_FIRST rounds the sum as torch does."""
    # Without `other`, a masked lane may hold NaN, and NaN times dy = 0 would enter the row's sum.
    ptrs = weight_ptr + col
    weight = tl.load(ptrs) if EVEN_H else tl.load(ptrs, mask=col < H, other=0.0)
    scale = weight.to(tl.float32) + offset
    if CAST_FIRST:
        scale = scale.to(weight.dtype).to(tl.float32)
    return scale[None, :]


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [R, H], rows x_stride apart
    weight_ptr,  # [H] or None
    y_ptr,  # [R, H] contiguous
    rstd_ptr,  # [R] fp32
    x_stride,
    R,
    H,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    EVEN_H: tl.constexpr,  # H == BLOCK_H: columns need no mask
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_H)
    # The compiler folds a constant mask, so a single full row is loaded without predicates.
    row_mask = row < R if BLOCK_R > 1 else tl.full([BLOCK_R], True, tl.int1)
    mask = row_mask[:, None] if EVEN_H else row_mask[:, None] & (col < H)[None, :]

    x_in = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    x = x_in.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)

    y = x * rstd[:, None]
    if weight_ptr is not None:
        if CAST_FIRST:
            y = y.to(x_in.dtype).to(tl.float32)
        y = _load_scale(weight_ptr, offset, col, H, CAST_FIRST, EVEN_H) * y
    y_ptrs = y_ptr + row[:, None] * H + col[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # [R, H], rows dy_stride apart
    x_ptr,  # [R, H], rows x_stride apart
    weight_ptr,  # [H] or None
    rstd_ptr,  # [R] fp32
    dx_ptr,  # [R, H] contiguous, or None: not needed
    dweight_ptr,  # [programs, H] fp32, or None: not needed
    dy_stride,
    x_stride,
    R,
    H,
    offset,
    CAST_FIRST: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HOIST_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_H)
    dweight = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    if HOIST_WEIGHT and weight_ptr is not None:
        scale = _load_scale(weight_ptr, offset, col, H, CAST_FIRST, EVEN_H)

    step = tl.num_programs(0) * BLOCK_R
    for first_row in tl.range(program * BLOCK_R, R, step, num_stages=STAGES):
        row = (first_row + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_mask = row < R if BLOCK_R > 1 else tl.full([BLOCK_R], True, tl.int1)
        mask = row_mask[:, None] if EVEN_H else row_mask[:, None] & (col < H)[None, :]

        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        xhat = x.to(tl.float32) * rstd
        g = dy.to(tl.float32)
        if dweight_ptr is not None:
            dweight += g * xhat
        if dx_ptr is not None:
            if weight_ptr is not None:
                if not HOIST_WEIGHT:
                    scale = _load_scale(weight_ptr, offset, col, H, CAST_FIRST, EVEN_H)
                g *= scale
            dx = rstd * (g - xhat * (tl.sum(g * xhat, 1) / H)[:, None])
            dx_ptrs = dx_ptr + row[:, None] * H + col[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if dweight_ptr is not None:
        dweight_ptrs = dweight_ptr + program.to(tl.int64) * H + col
        tl.store(dweight_ptrs, tl.sum(dweight, 0), mask=col < H)


def _y_dtype(x, weight, cast_first):
    promotes = weight is not None and cast_first
    return torch.promote_types(x.dtype, weight.dtype) if promotes else x.dtype


def _launch_fwd(x, weight, eps, offset, cast_first):
    y = torch.empty(x.shape, dtype=_y_dtype(x, weight, cast_first), device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rstd
    x_RH = as_rows(x)
    R, H = x_RH.shape
    BLOCK_R, BLOCK_H, warps = tile(H, FWD_TILES)
    launch(
        _rms_norm_fwd_kernel, (cdiv(R, BLOCK_R),),
        x_RH, None if weight is None else weight.contiguous(), y, rstd, x_RH.stride(0), R, H, eps,
        offset, cast_first, H == BLOCK_H, BLOCK_R, BLOCK_H, num_warps=warps,
    )  # fmt: skip
    return y, rstd


def _fake_fwd(x, weight, eps, offset, cast_first):
    y = x.new_empty(x.shape, dtype=_y_dtype(x, weight, cast_first))
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_bwd(dy, x, weight, rstd, offset, cast_first, need_dx, need_dweight):
    H = x.shape[-1]
    BLOCK_R, BLOCK_H, warps, programs_per_sm, stages, hoist_weight = tile(H, _BWD_TILES)
    dy_RH, x_RH = as_rows(dy), as_rows(x)
    R = x_RH.shape[0]
    programs = min(cdiv(R, BLOCK_R), programs_per_sm * num_sms(x.device))
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    partials = None
    if need_dweight:
        partials = torch.empty(programs, H, dtype=torch.float32, device=x.device)
    if programs:
        launch(
            _rms_norm_bwd_kernel, (programs,),
            dy_RH, x_RH, None if weight is None else weight.contiguous(), rstd,
            dx if need_dx else None, partials, dy_RH.stride(0), x_RH.stride(0), R, H, offset,
            cast_first, H == BLOCK_H, BLOCK_R, BLOCK_H, stages, hoist_weight, num_warps=warps,
        )  # fmt: skip
    return dx, partials.sum(0).to(weight.dtype) if need_dweight else x.new_empty(0)


def _fake_bwd(dy, x, weight, rstd, offset, cast_first, need_dx, need_dweight):
    dweight = weight.new_empty(weight.shape) if need_dweight else x.new_empty(0)
    return x.new_empty(x.shape if need_dx else 0), dweight


_rms_norm_fwd = register_op(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, float offset, bool cast_first)"
    " -> (Tensor y, Tensor rstd)",
    _launch_fwd,
    _fake_fwd,
)
# Gradients that are not needed are returned empty, of shape [0].
_rms_norm_bwd = register_op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool cast_first,"
    " bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
    _launch_bwd,
    _fake_bwd,
)


def _reference_of(ctx):
    options = {"eps": ctx.eps, "offset": ctx.offset, "cast_first": ctx.cast_first}
    return functools.partial(rms_norm_reference, **options), ctx.saved_tensors[:2]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_first):
        y, rstd = _rms_norm_fwd(x, weight, eps, offset, cast_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.offset, ctx.cast_first = eps, offset, cast_first
        return y

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dy):
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dx, dweight = _rms_norm_bwd(
            dy, *ctx.saved_tensors, ctx.offset, ctx.cast_first, need_dx, need_dweight
        )
        return dx if need_dx else None, dweight if need_dweight else None, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> torch.Tensor:
    """Return the RMSNorm over the last dimension, with xhat = x / sqrt(mean(x^2) + eps) in fp32.

    cast_first (Llama): y = (offset + weight) * xhat.to(x.dtype), in the dtype both promote to.
    otherwise (OLMo2; Gemma with offset 1): y = ((offset + weight.float()) * xhat).to(x.dtype).

    Args:
        x: [..., H], fp32, bf16 or fp16, any strides.
        weight: [H], of any of these dtypes, or None for no scale (`offset` then has no effect).
        eps: added to the mean square.
        offset: added to weight.
        cast_first: round xhat to x.dtype before scaling it.

    Returns:
        y [..., H], contiguous on the kernel path. fp64 and H > 65536 run on the torch reference.
        With `create_graph=True` the backward pass runs in torch.

    Raises:
        ValueError: if x or weight is not floating point, or weight is not [H] or not on x's device.

    Paper: https://arxiv.org/abs/1910.07467
    """
    check_input("rms_norm", x, weight=weight)
    if not has_kernel(x, weight):

        def reference(x, weight):
            return rms_norm_reference(x, weight, eps=eps, offset=offset, cast_first=cast_first)

        return by_torch(reference, (x,), (weight,))
    if not pays(x, MIN_ELEMENTS) and _has_torch_kernel(x, weight, offset):

        def torch_norm(x, weight):
            return F.rms_norm(x, x.shape[-1:], weight, eps)

        return recomputable(torch_norm(x, weight), torch_norm, (x,), (weight,))
    options = float(eps), float(offset), cast_first
    y = _RMSNorm.apply(x, weight, *options)
    return recomputable(y, lambda *args: _rms_norm_fwd(*args, *options)[0], (x,), (weight,))


def _has_torch_kernel(x, weight, offset):
    """Return whether torch's fused norm may run instead.

    It rounds once, after scaling, so it is at least as exact as either form.
    """
    return weight is None or (weight.dtype == x.dtype and offset == 0.0)
