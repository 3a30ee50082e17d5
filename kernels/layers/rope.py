"""Rotary position embedding of queries and keys, in one launch.

    rotate half:  y_j       = x_j cos_j - x_{j+R/2} sin_j                  for 0 <= j < R/2
                  y_{j+R/2} = x_{j+R/2} cos_{j+R/2} + x_j sin_{j+R/2}
    interleaved:  the same with pairs (2j, 2j+1) instead of (j, j+R/2)
    split:        the pair (2j, 2j+1) goes to (j, j+R/2)
    backward:     dx_a = dy_a cos_a + dy_b sin_b,   dx_b = dy_b cos_b - dy_a sin_a

The backward, for a pair (a, b), is the transpose for any table: cos_a and cos_b may differ.
The other D - R channels, behind these or before them, pass through (partial rotary). Arithmetic is
in fp32, rounded once.

Shapes: B batch, S sequence, D head dimension, R <= D rotated channels, Hq and Hk heads;
q [B, Hq, S, D], k [B, Hk, S, D], cos and sin [B or 1, S, R].
Dtypes: q, k and the tables are fp32, bf16 or fp16 each (fp64 on the torch path).

Paper: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..launch import launch
from ..runtime import cdiv, next_power_of_2, register_op, tl, triton, use_triton
from ..second_derivative import twice_differentiable

MIN_ELEMENTS = 1 << 22  # of q; below this, a dozen torch kernels are as fast (H200, with host)
# Elements of q that a program and a warp rotate: four 16-byte loads of bf16 per thread.
_TILE = 4096
_ELEMENTS_PER_WARP = 1024


def rope_reference(
    q, k, cos, sin, interleaved=False, split=False, half_table=False, narrow_table=False,
    inverse=False, trailing=False, keep_dtype=False,
):  # fmt: skip
    """Compute `rope` in plain torch: differentiable in all four tensors, in any dtype."""
    if half_table and not narrow_table:
        cos, sin = (table[..., : table.shape[-1] // 2] for table in (cos, sin))
    if half_table or narrow_table:
        cos, sin = (_repeated(table, interleaved and not split) for table in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        sin = -sin

    def rotate(x):
        dtype, R = x.dtype, cos.shape[-1]
        if keep_dtype:
            x = x.to(torch.promote_types(dtype, torch.float32))
        start = x.shape[-1] - R if trailing else 0
        pairs = x[..., start : start + R]
        if split:
            pairs = torch.cat([pairs[..., ::2], pairs[..., 1::2]], dim=-1)
        y = pairs * cos + _partner(pairs, interleaved and not split) * sin
        if x.shape[-1] > R:
            y = torch.cat([x[..., :start], y, x[..., start + R :]], dim=-1)
        return y.to(dtype) if keep_dtype else y

    return rotate(q), rotate(k)


def _repeated(half, interleaved):
    return half.repeat_interleave(2, dim=-1) if interleaved else half.repeat(1, 1, 2)


def _partner(x, interleaved):
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


@triton.jit
def _load_pairs(
    row_ptr, row_mask,
    ROWS: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return the first and the second members of all pairs, two fp32 blocks [ROWS, P]."""
    if INTERLEAVED:
        # One contiguous load, split in registers: strided loads would be a 16th as wide.
        cols = tl.arange(0, 2 * P)[None, :]
        x = tl.load(row_ptr + cols, mask=row_mask & (cols < 2 * HALF)).to(tl.float32)
        return tl.split(tl.reshape(x, [ROWS, P, 2]))
    else:
        cols = tl.arange(0, P)[None, :]
        mask = row_mask & (cols < HALF)
        a = tl.load(row_ptr + cols, mask=mask).to(tl.float32)
        b = tl.load(row_ptr + HALF + cols, mask=mask).to(tl.float32)
        return a, b


@triton.jit
def _store_pairs(
    row_ptr, row_mask, a, b,
    ROWS: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * P)[None, :]
        y = tl.reshape(tl.join(a, b), [ROWS, 2 * P])
        tl.store(row_ptr + cols, y.to(dtype), mask=row_mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, P)[None, :]
        mask = row_mask & (cols < HALF)
        tl.store(row_ptr + cols, a.to(dtype), mask=mask)
        tl.store(row_ptr + HALF + cols, b.to(dtype), mask=mask)


@triton.jit
def _load_table(
    table_ptr,
    HALF: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, HALF_TABLE: tl.constexpr,
):  # fmt: skip
    """Return the table's entries for the first and second members of all pairs, two blocks
    [1, P]."""
    if HALF_TABLE:
        cols = tl.arange(0, P)[None, :]
        table = tl.load(table_ptr + cols, mask=cols < HALF).to(tl.float32)
        return table, table
    else:
        row = tl.arange(0, 1)[:, None]
        return _load_pairs(table_ptr + row, row < 1, 1, HALF, P, INTERLEAVED)


@triton.jit
def _copy_rest(
    x_row, y_row, row_mask, START: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr
):
    cols = tl.arange(0, REST_P)[None, :]
    mask = row_mask & (cols < REST)
    x = tl.load(x_row + START + cols, mask=mask)
    tl.store(y_row + START + cols, x.to(y_row.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, S,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    q_out_stride_b, q_out_stride_h, q_out_stride_s,
    k_out_stride_b, k_out_stride_h, k_out_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s,
    HQ: tl.constexpr, HK: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,  # R / 2 pairs, and D - R channels that pass through
    P: tl.constexpr, REST_P: tl.constexpr,  # HALF and REST, rounded up to powers of two
    BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr,
    # Whether pairs are neighbors where they come from, where they go, and in the table.
    FROM_NEIGHBORS: tl.constexpr, TO_NEIGHBORS: tl.constexpr, TABLE_NEIGHBORS: tl.constexpr,
    HALF_TABLE: tl.constexpr, INVERSE: tl.constexpr, TRAILING: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotate, in program (i, j), the j-th share of the query and key heads at position i."""
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    hq = (tl.program_id(1) * BLOCK_HQ + tl.arange(0, BLOCK_HQ)).to(tl.int64)[:, None]
    hk = (tl.program_id(1) * BLOCK_HK + tl.arange(0, BLOCK_HK)).to(tl.int64)[:, None]
    q_mask, k_mask = hq < HQ, hk < HK
    q_row = q_ptr + b * q_stride_b + s * q_stride_s + hq * q_stride_h
    k_row = k_ptr + b * k_stride_b + s * k_stride_s + hk * k_stride_h
    q_out_row = q_out_ptr + b * q_out_stride_b + s * q_out_stride_s + hq * q_out_stride_h
    k_out_row = k_out_ptr + b * k_out_stride_b + s * k_out_stride_s + hk * k_out_stride_h
    cos_row = cos_ptr + b * cos_stride_b + s * cos_stride_s
    sin_row = sin_ptr + b * sin_stride_b + s * sin_stride_s

    # Every load before the first store: the compiler may not move a load above a store.
    START: tl.constexpr = REST if TRAILING else 0  # pyright: ignore[reportAssignmentType]
    qa, qb = _load_pairs(q_row + START, q_mask, BLOCK_HQ, HALF, P, FROM_NEIGHBORS)
    ka, kb = _load_pairs(k_row + START, k_mask, BLOCK_HK, HALF, P, FROM_NEIGHBORS)
    cos_a, cos_b = _load_table(cos_row, HALF, P, TABLE_NEIGHBORS, HALF_TABLE)
    sin_a, sin_b = _load_table(sin_row, HALF, P, TABLE_NEIGHBORS, HALF_TABLE)
    if INVERSE:
        sin_a, sin_b = -sin_a, -sin_b
    if BACKWARD:  # the transposed rotation, written as a forward one
        sin_a, sin_b = -sin_b, -sin_a

    qa, qb = qa * cos_a - qb * sin_a, qb * cos_b + qa * sin_b
    ka, kb = ka * cos_a - kb * sin_a, kb * cos_b + ka * sin_b
    _store_pairs(q_out_row + START, q_mask, qa, qb, BLOCK_HQ, HALF, P, TO_NEIGHBORS)
    _store_pairs(k_out_row + START, k_mask, ka, kb, BLOCK_HK, HALF, P, TO_NEIGHBORS)
    if REST > 0:
        PASSED: tl.constexpr = 0 if TRAILING else 2 * HALF
        _copy_rest(q_row, q_out_row, q_mask, PASSED, REST, REST_P)
        _copy_rest(k_row, k_out_row, k_mask, PASSED, REST, REST_P)


@functools.lru_cache(maxsize=256)
def _tiling(Hq: int, Hk: int, D: int, R: int) -> tuple[Any, dict]:
    """Return how many programs share the heads of one position, and the kernel's sizes."""
    P = next_power_of_2(R // 2)
    block_hq = min(next_power_of_2(max(1, Hq)), max(1, _TILE // (2 * P)))
    shares = max(1, -(-Hq // block_hq))
    block_hk = next_power_of_2(max(1, cdiv(Hk, shares)))
    return shares, {
        "HQ": Hq, "BLOCK_HQ": block_hq,
        "HK": Hk, "BLOCK_HK": block_hk,
        "HALF": R // 2, "P": P,
        "REST": D - R, "REST_P": next_power_of_2(max(1, D - R)),
        "num_warps": min(8, max(1, block_hq * 2 * P // _ELEMENTS_PER_WARP)),
    }  # fmt: skip


def _empty(x: torch.Tensor, dtype: torch.dtype, heads_inner: bool) -> torch.Tensor:
    B, H, S, D = x.shape
    if heads_inner:
        return x.new_empty((B, S, H, D), dtype=dtype).transpose(1, 2)
    return x.new_empty((B, H, S, D), dtype=dtype)


def _fake(q, k, cos, sin, q_dtype, k_dtype, heads_inner, *options):
    return _empty(q, q_dtype, heads_inner), _empty(k, k_dtype, heads_inner)


def _launch(
    q, k, cos, sin, q_dtype, k_dtype, heads_inner,
    interleaved, split, half_table, narrow_table, inverse, trailing, backward,
):  # fmt: skip
    q_out, k_out = _empty(q, q_dtype, heads_inner), _empty(k, k_dtype, heads_inner)
    B, Hq, S, D = q.shape
    if B * S * (Hq + k.shape[1]) == 0:
        return q_out, k_out
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    shares, sizes = _tiling(Hq, k.shape[1], D, _rotated(cos, narrow_table))
    # A table that the whole batch shares has a batch stride of 0.
    table_strides = [n for t in (cos, sin) for n in (t.stride(0) * (t.shape[0] > 1), t.stride(1))]
    result = interleaved and not split  # the table lies as the result of the forward pass does
    launch(
        _rope_kernel, (B * S, shares),
        q, k, cos, sin, q_out, k_out, S,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
        *table_strides, **sizes,
        FROM_NEIGHBORS=result if backward else interleaved,
        TO_NEIGHBORS=interleaved if backward else result,
        TABLE_NEIGHBORS=result,
        HALF_TABLE=half_table or narrow_table, INVERSE=inverse, TRAILING=trailing,
        BACKWARD=backward,
    )  # fmt: skip
    return q_out, k_out


_rope_op = register_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, ScalarType q_dtype, ScalarType k_dtype, "
    "bool heads_inner, bool interleaved, bool split, bool half_table, bool narrow_table, "
    "bool inverse, bool trailing, bool backward) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def _reference_of(ctx):
    # A rotation is linear: its gradients do not depend on the values of q and k.
    cos, sin = ctx.saved_tensors
    needed = zip(ctx.shapes, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    states = [cos.new_zeros(s, dtype=d).requires_grad_(need) for s, d, need in needed]
    options = *ctx.options[1:], ctx.keep_dtype
    return (lambda q, k: rope_reference(q, k, cos, sin, *options)), states


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, *options):
        ctx.save_for_backward(cos, sin)
        *pairs, keep_dtype = options
        ctx.dtypes, ctx.shapes, ctx.keep_dtype = (q.dtype, k.dtype), (q.shape, k.shape), keep_dtype
        # Gradients get q's layout too, whatever layout attention returns, so that the projection's
        # backward can view them instead of copying.
        ctx.options = q.stride(1) <= q.stride(2), *pairs
        dtypes = [d if keep_dtype else torch.promote_types(d, cos.dtype) for d in ctx.dtypes]
        return _rope_op(q, k, cos, sin, *dtypes, *ctx.options, False)

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dq, dk):
        grads = _rope_op(dq, dk, *ctx.saved_tensors, *ctx.dtypes, *ctx.options, True)
        return *grads, *[None] * 9


def _rotated(cos: torch.Tensor, narrow_table: bool) -> int:
    return cos.shape[-1] * (2 if narrow_table else 1)


def why_not(q, k, cos, sin, narrow_table: bool = False) -> str | None:
    """Return what is wrong with the arguments of `rope`, or None."""
    if q.dim() != 4 or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        return (
            "q and k must be [B, Hq, S, D] and [B, Hk, S, D], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    B, S, D = q.shape[0], q.shape[-2], q.shape[-1]
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1] != S:
        return (
            f"cos and sin must both be [1 or {B}, {S}, R], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    R = _rotated(cos, narrow_table)
    if R % 2 or not 0 < R <= D:
        width = "twice the width of cos" if narrow_table else "the width of cos"
        return f"R, {width}, must be even and in 2..{D} (D), got {R}."
    if cos.dtype != sin.dtype or not all(x.is_floating_point() for x in (q, k, cos)):
        dtypes = ", ".join(str(x.dtype) for x in (q, k, cos, sin))
        return f"floating q and k, cos and sin of one dtype, got {dtypes}."
    if not q.device == k.device == cos.device == sin.device:
        devices = ", ".join(str(x.device) for x in (q, k, cos, sin))
        return f"q, k, cos and sin must be on one device, got {devices}."
    return None


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    split: bool = False,
    half_table: bool = False,
    narrow_table: bool = False,
    inverse: bool = False,
    trailing: bool = False,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate R channels of each query and key head by the angles of its position.

    Args:
        q: [B, Hq, S, D], any strides; usually a transposed view of [B, S, Hq, D].
        k: [B, Hk, S, D]; Hk may be 0, to rotate q alone.
        cos, sin: [B or 1, S, R] with R even and R <= D, already gathered by position.
        interleaved: pairs are (2j, 2j+1) (Cohere, GLM) instead of (j, j + R/2) (Llama).
        split: takes interleaved pairs, and returns them, and takes the table, as if they were not
            (DeepSeek's latent attention).
        half_table: pair j uses entry j for both members; only the first R/2 columns are read (GLM).
        narrow_table: the same with tables that have only these R/2 columns (gpt-oss).
        inverse: rotate by the negative angle.
        trailing: the last R channels are rotated (DeepSeek V4) instead of the first.
        keep_dtype: return the dtypes of q and k (Cohere, OLMo2, which compute in fp32 and cast
            back) instead of promote_types(q.dtype, cos.dtype), the dtype of `q * cos`.

    Returns (q_out, k_out), dense, in the memory order of q. fp64 tensors, and tables that require a
    gradient, take `rope_reference`. Raises ValueError for wrong shapes, an odd R, R > D, integer
    tensors, or several devices. Paper: Su et al., "RoFormer", arXiv:2104.09864.
    """
    problem = why_not(q, k, cos, sin, narrow_table)
    if split and not interleaved:
        problem = "split is for interleaved pairs: set interleaved, too."
    if problem is not None:
        raise ValueError(f"rope: {problem}")
    options = interleaved, split, half_table, narrow_table, inverse, trailing, keep_dtype
    if (
        torch.float64 in (q.dtype, k.dtype, cos.dtype)
        or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        or not use_triton(q)
    ):
        return rope_reference(q, k, cos, sin, *options)
    return _Rope.apply(q, k, cos, sin, *options)
