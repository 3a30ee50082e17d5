"""The Triton kernel of `rope`, and its launch.

A program rotates a share of the heads at one position, by pairs: q and k are read and written once,
forward and backward alike. `rope.py` has the formulas, and what the options mean.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..launch import launch
from ..runtime import cdiv, next_power_of_2, register_op, tl, triton

# Elements of q that a program and a warp rotate: four 16-byte loads of bf16 per thread.
_TILE = 4096
_ELEMENTS_PER_WARP = 1024


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
    table_ptr, stride,
    HALF: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, HALF_TABLE: tl.constexpr,
):  # fmt: skip
    """Return the table's entries for the first and second members of all pairs, two blocks
    [1, P]."""
    if HALF_TABLE:
        cols = tl.arange(0, P)[None, :]
        table = tl.load(table_ptr + cols * stride, mask=cols < HALF).to(tl.float32)
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
    cos_stride_b, cos_stride_s, cos_stride_r, sin_stride_b, sin_stride_s, sin_stride_r,
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
    cos_a, cos_b = _load_table(cos_row, cos_stride_r, HALF, P, TABLE_NEIGHBORS, HALF_TABLE)
    sin_a, sin_b = _load_table(sin_row, sin_stride_r, HALF, P, TABLE_NEIGHBORS, HALF_TABLE)
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


def rotated(cos: torch.Tensor, narrow_table: bool) -> int:
    """Return the number of channels that a table rotates."""
    return cos.shape[-1] * (2 if narrow_table else 1)


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
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    half_table = half_table or narrow_table
    if not half_table:  # entries are loaded by pairs; a half table may be a part of a complex one
        cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    shares, sizes = _tiling(Hq, k.shape[1], D, rotated(cos, narrow_table))
    # A table that the whole batch shares has a batch stride of 0.
    table_strides = [
        n for t in (cos, sin) for n in (t.stride(0) * (t.shape[0] > 1), *t.stride()[1:])
    ]
    result = interleaved and not split  # the table lies as the result of the forward pass does
    launch(
        _rope_kernel, (B * S, shares),
        q, k, cos, sin, q_out, k_out, S,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
        *table_strides, **sizes,
        FROM_NEIGHBORS=result if backward else interleaved,
        TO_NEIGHBORS=interleaved if backward else result,
        TABLE_NEIGHBORS=result,
        HALF_TABLE=half_table, INVERSE=inverse, TRAILING=trailing,
        BACKWARD=backward,
    )  # fmt: skip
    return q_out, k_out


rope_op = register_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, ScalarType q_dtype, ScalarType k_dtype, "
    "bool heads_inner, bool interleaved, bool split, bool half_table, bool narrow_table, "
    "bool inverse, bool trailing, bool backward) -> (Tensor, Tensor)",
    _launch,
    _fake,
)
