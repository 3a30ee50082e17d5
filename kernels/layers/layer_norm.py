"""LayerNorm: y = weight * xhat + bias, with xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps).

Shapes: x, y [..., H]; weight, bias [H], each optional; mean, rstd [...], fp32. In kernels R is
rows, H the normalized width. The variance is the biased one, over H.
Dtypes: x, weight and bias are fp32, bf16 or fp16 each; all arithmetic is fp32 (fp64 on the torch
path) and y has x's dtype.

Backward, with g = dy * weight:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum over rows of dy * xhat,    dbias = sum over rows of dy

Forward keeps x, weight, mean and rstd, never xhat. Backward is persistent: each program walks over
rows, keeps its part of dweight and dbias in registers, and writes one row of fp32 partials of each,
which torch sums.

Paper: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
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
# and whether weight stays in registers, where there is room besides x, dy and the two partials.
# Rows wider than 8192 spill some registers: correct, but slower.
_BWD_TILES = (
    (2048, 2048, 4, 4, 2, True),
    (4096, 4096, 8, 2, 1, False),
    (8192, 8192, 16, 1, 2, True),
    (16384, 16384, 32, 1, 2, False),
    (MAX_H, 16384, 32, 1, 1, False),
)


def layer_norm_reference(x, weight=None, bias=None, *, eps):
    """Compute `layer_norm` in differentiable torch, in fp32 (in fp64 for fp64 input)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if x.shape[-1] == 1:  # torch's x * rstd - mean * rstd does not cancel exactly if x is large
        y = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square() + eps)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(x.dtype)
    y = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype)


@triton.jit
def _load_row(ptr, col, H, EVEN_H: tl.constexpr):
    """Load a tensor [H] as an fp32 block [1, BLOCK_H]."""
    row = tl.load(ptr + col) if EVEN_H else tl.load(ptr + col, mask=col < H, other=0.0)
    return row.to(tl.float32)[None, :]


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [R, H], rows x_stride apart
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    y_ptr,  # [R, H] contiguous
    mean_ptr,  # [R] fp32
    rstd_ptr,  # [R] fp32
    x_stride,
    R,
    H,
    eps,
    EVEN_H: tl.constexpr,  # H == BLOCK_H: columns need no mask
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_H)
    # The compiler folds a constant mask, so a single full row is loaded without predicates.
    row_mask = row < R if BLOCK_R > 1 else tl.full([BLOCK_R], True, tl.int1)
    mask = row_mask[:, None] if EVEN_H else row_mask[:, None] & (col < H)[None, :]

    x_ptrs = x_ptr + row[:, None] * x_stride + col[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / H
    # Two passes over registers: mean(x^2) - mean^2 would cancel if the mean is large.
    x -= mean[:, None]
    centered = x if EVEN_H else tl.where(mask, x, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / H + eps)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)

    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= _load_row(weight_ptr, col, H, EVEN_H)
    if bias_ptr is not None:
        y += _load_row(bias_ptr, col, H, EVEN_H)
    y_ptrs = y_ptr + row[:, None] * H + col[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [R, H], rows dy_stride apart
    x_ptr,  # [R, H], rows x_stride apart
    weight_ptr,  # [H] or None
    mean_ptr,  # [R] fp32
    rstd_ptr,  # [R] fp32
    dx_ptr,  # [R, H] contiguous, or None: not needed
    dweight_ptr,  # [programs, H] fp32, or None: not needed
    dbias_ptr,  # [programs, H] fp32, or None: not needed
    dy_stride,
    x_stride,
    R,
    H,
    EVEN_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HOIST_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_H)
    dweight = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    if HOIST_WEIGHT and weight_ptr is not None:
        weight = _load_row(weight_ptr, col, H, EVEN_H)

    step = tl.num_programs(0) * BLOCK_R
    for first_row in tl.range(program * BLOCK_R, R, step, num_stages=STAGES):
        row = (first_row + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_mask = row < R if BLOCK_R > 1 else tl.full([BLOCK_R], True, tl.int1)
        mask = row_mask[:, None] if EVEN_H else row_mask[:, None] & (col < H)[None, :]

        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        xhat = (x.to(tl.float32) - mean) * rstd
        g = dy.to(tl.float32)  # 0 where masked, so that masked lanes add nothing to the sums below
        if dweight_ptr is not None:
            dweight += g * xhat
        if dbias_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            if weight_ptr is not None:
                if not HOIST_WEIGHT:
                    weight = _load_row(weight_ptr, col, H, EVEN_H)
                g *= weight
            mean_g = (tl.sum(g, 1) / H)[:, None]
            mean_g_xhat = (tl.sum(g * xhat, 1) / H)[:, None]
            dx = rstd * (g - mean_g - xhat * mean_g_xhat)
            dx_ptrs = dx_ptr + row[:, None] * H + col[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = program.to(tl.int64) * H + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=col < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=col < H)


def _launch_fwd(x, weight, bias, eps):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, mean, rstd
    x_RH = as_rows(x)
    R, H = x_RH.shape
    BLOCK_R, BLOCK_H, warps = tile(H, FWD_TILES)
    launch(
        _layer_norm_fwd_kernel, (cdiv(R, BLOCK_R),),
        x_RH, None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(), y, mean, rstd, x_RH.stride(0), R, H, eps,
        H == BLOCK_H, BLOCK_R, BLOCK_H, num_warps=warps,
    )  # fmt: skip
    return y, mean, rstd


def _fake_fwd(x, weight, bias, eps):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _launch_bwd(dy, x, weight, bias_dtype, mean, rstd, need_dx, need_dweight, need_dbias):
    H = x.shape[-1]
    BLOCK_R, BLOCK_H, warps, programs_per_sm, stages, hoist_weight = tile(H, _BWD_TILES)
    dy_RH, x_RH = as_rows(dy), as_rows(x)
    R = x_RH.shape[0]
    programs = min(cdiv(R, BLOCK_R), programs_per_sm * num_sms(x.device))
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    # One tensor for both partials, so that one kernel sums them.
    needed = [need_dweight, need_dbias]
    partials = torch.empty(sum(needed), programs, H, dtype=torch.float32, device=x.device)
    dweight_partials = partials[0] if need_dweight else None
    dbias_partials = partials[-1] if need_dbias else None
    if programs:
        launch(
            _layer_norm_bwd_kernel, (programs,),
            dy_RH, x_RH, None if weight is None else weight.contiguous(), mean, rstd,
            dx if need_dx else None, dweight_partials, dbias_partials, dy_RH.stride(0),
            x_RH.stride(0), R, H, H == BLOCK_H, BLOCK_R, BLOCK_H, stages, hoist_weight,
            num_warps=warps,
        )  # fmt: skip
    sums = partials.sum(1)
    return (
        dx,
        sums[0].to(weight.dtype, copy=True) if need_dweight else x.new_empty(0),
        sums[-1].to(bias_dtype, copy=True) if need_dbias else x.new_empty(0),
    )


def _fake_bwd(dy, x, weight, bias_dtype, mean, rstd, need_dx, need_dweight, need_dbias):
    H = x.shape[-1]
    return (
        x.new_empty(x.shape if need_dx else 0),
        weight.new_empty(H) if need_dweight else x.new_empty(0),
        x.new_empty(H if need_dbias else 0, dtype=bias_dtype if need_dbias else x.dtype),
    )


_layer_norm_fwd = register_op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _launch_fwd,
    _fake_fwd,
)
# Gradients that are not needed are returned empty, of shape [0]. Backward needs only bias's dtype.
_layer_norm_bwd = register_op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, ScalarType? bias_dtype, Tensor mean,"
    " Tensor rstd, bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _launch_bwd,
    _fake_bwd,
)


def _reference_of(ctx):
    x, weight, *_ = ctx.saved_tensors
    bias = None
    if ctx.needs_input_grad[2]:  # no gradient depends on its value
        bias = x.new_zeros(x.shape[-1:], dtype=ctx.bias_dtype).requires_grad_()
    return functools.partial(layer_norm_reference, eps=ctx.eps), (x, weight, bias)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = _layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype, ctx.eps = None if bias is None else bias.dtype, eps
        return y

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads = _layer_norm_bwd(dy, x, weight, ctx.bias_dtype, mean, rstd, *needed)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> torch.Tensor:
    """Return the layer norm over the last dimension, computed in fp32.

    y = (weight * xhat + bias).to(x.dtype), with xhat = (x - mean(x)) / sqrt(var(x) + eps) and the
    biased variance, like `torch.nn.functional.layer_norm`. Cohere's norm has a weight but no bias.

    Args:
        x: [..., H], fp32, bf16 or fp16, any strides.
        weight: [H], of any of these dtypes, or None for no scale.
        bias: [H], of any of these dtypes, or None for no shift.
        eps: added to the variance.

    Returns:
        y [..., H], of x's dtype, contiguous on the kernel path. fp64 and H > 65536 run on the torch
        reference. With `create_graph=True` the backward pass runs in torch.

    Raises:
        ValueError: if a tensor is not floating point, or weight or bias is not [H] or not on x's
            device.

    Paper: https://arxiv.org/abs/1607.06450
    """
    check_input("layer_norm", x, weight=weight, bias=bias)
    parameters = weight, bias
    if not has_kernel(x, *parameters):

        def reference(x, weight, bias):
            return layer_norm_reference(x, weight, bias, eps=eps)

        return by_torch(reference, (x,), parameters)
    one_dtype = all(t is None or t.dtype == x.dtype for t in parameters)
    if one_dtype and x.shape[-1] > 1 and not pays(x, MIN_ELEMENTS):

        def torch_norm(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

        return recomputable(torch_norm(x, *parameters), torch_norm, (x,), parameters)
    y = _LayerNorm.apply(x, *parameters, float(eps))
    return recomputable(y, lambda *args: _layer_norm_fwd(*args, float(eps))[0], (x,), parameters)
