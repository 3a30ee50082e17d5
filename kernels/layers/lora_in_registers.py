"""An adapter's GEMMs in Triton kernels that split or round the narrow operands as they load them.

Three kernels: h = scale x firstᵀ, y += h second, and hᵀ x.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..launch import launch
from ..runtime import HAS_TRITON, cdiv, next_power_of_2, tl, triton
from .lora_in_parts import split

_INTERPRETED = HAS_TRITON and not isinstance(split, triton.JITFunction)


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """Return total + a b of 16-bit operands. WIDEN is for the interpreter, which lacks bf16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _add_dot(total, a, b, A_EXACT: tl.constexpr, B_EXACT: tl.constexpr, WIDEN: tl.constexpr):
    """Return total + a b. Exact operands are fp32; if both are, their upper 16 bits are used."""
    if A_EXACT and B_EXACT:
        a_hi, a_mid, _ = split(a)
        b_hi, b_mid, _ = split(b)
        total = _dot(a_mid, b_hi, total, WIDEN)
        total = _dot(a_hi, b_mid, total, WIDEN)
        total = _dot(a_hi, b_hi, total, WIDEN)
    elif A_EXACT:
        hi, mid, lo = split(a)
        total = _dot(lo, b, total, WIDEN)
        total = _dot(mid, b, total, WIDEN)
        total = _dot(hi, b, total, WIDEN)
    elif B_EXACT:
        hi, mid, lo = split(b)
        total = _dot(a, lo, total, WIDEN)
        total = _dot(a, mid, total, WIDEN)
        total = _dot(a, hi, total, WIDEN)
    else:
        total = _dot(a, b, total, WIDEN)
    return total


@triton.jit
def _narrow_kernel(
    x_ptr, first_ptr, sums_ptr, stride_x, stride_r, stride_k, scale, N, R, K, columns_per_sum,
    EXACT: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute scale x firstᵀ over a part of the columns, one of sums [sums, N, R]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    in_rows, in_rank = (row < N)[:, None], (r < R)[None, :]
    start = tl.program_id(2) * columns_per_sum
    total = tl.zeros((ROWS, RANK), tl.float32)
    for offset in range(0, columns_per_sum, COLUMNS):
        col = start + offset + tl.arange(0, COLUMNS)
        x_ptrs = x_ptr + row[:, None] * stride_x + col[None, :]
        x = tl.load(x_ptrs, mask=in_rows & (col < K)[None, :], other=0.0)
        first_ptrs = first_ptr + col[:, None].to(tl.int64) * stride_k + r[None, :] * stride_r
        first = tl.load(first_ptrs, mask=(col < K)[:, None] & in_rank, other=0.0)
        if not EXACT:
            first = first.to(x.dtype)
        block = tl.zeros((ROWS, RANK), tl.float32)  # tensor cores drop bits when they accumulate
        total += _add_dot(block, x, first, False, EXACT, WIDEN)
    sums_ptrs = sums_ptr + (tl.program_id(2).to(tl.int64) * N + row[:, None]) * R + r[None, :]
    tl.store(sums_ptrs, total * scale, mask=in_rows & in_rank)


@triton.jit
def _add_kernel(
    y_ptr, sums_ptr, h_ptr, second_ptr, stride_y, stride_r, stride_k, N, R, K,
    SUMS: tl.constexpr, BETA: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute y [N, K] = BETA y + h second, and store h [N, R], the total of sums [SUMS, N, R]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_cols = (row < N)[:, None], (col < K)[None, :]
    y_ptrs = y_ptr + row[:, None] * stride_y + col[None, :]
    if BETA:
        y = tl.load(y_ptrs, mask=in_rows & in_cols, other=0.0).to(tl.float32)
    else:
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for offset in range(0, R, RANK):
        r = offset + tl.arange(0, RANK)
        mask = in_rows & (r < R)[None, :]
        cell = row[:, None] * R + r[None, :]
        total = tl.load(sums_ptr + cell, mask=mask, other=0.0)
        for i in tl.static_range(1, SUMS):
            total += tl.load(sums_ptr + i * tl.cast(N, tl.int64) * R + cell, mask=mask, other=0.0)
        h = total.to(h_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(h_ptr + cell, h, mask=mask)
        second_ptrs = second_ptr + r[:, None] * stride_r + col[None, :].to(tl.int64) * stride_k
        second = tl.load(second_ptrs, mask=(r < R)[:, None] & in_cols, other=0.0)
        if not EXACT:
            second = second.to(h.dtype)
        y = _add_dot(y, h, second, EXACT, EXACT, WIDEN)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=in_rows & in_cols)


@triton.jit
def _over_rows_kernel(
    h_ptr, x_ptr, out_ptr, stride_x, stride_r, stride_k, N, R, K, rows_per_sum,
    EXACT: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute hᵀ x over a part of the rows, one of out [sums, R, K] (or [sums, K, R])."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    in_cols, in_rank = (col < K)[None, :], (r < R)[:, None]
    start = tl.program_id(2).to(tl.int64) * rows_per_sum
    end = tl.minimum(start + rows_per_sum, N)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for offset in range(0, rows_per_sum, ROWS):
        row = start + offset + tl.arange(0, ROWS)
        x_ptrs = x_ptr + row[:, None] * stride_x + col[None, :]
        x = tl.load(x_ptrs, mask=(row < end)[:, None] & in_cols, other=0.0)
        h_ptrs = h_ptr + row[None, :] * R + r[:, None]
        h = tl.load(h_ptrs, mask=(row < end)[None, :] & in_rank, other=0.0)
        block = tl.zeros((RANK, COLUMNS), tl.float32)
        total += _add_dot(block, h, x, EXACT, False, WIDEN)
    cell = r[:, None].to(tl.int64) * stride_r + col[None, :].to(tl.int64) * stride_k
    out_ptrs = out_ptr + tl.program_id(2).to(tl.int64) * R * K + cell
    tl.store(out_ptrs, total, mask=in_rank & in_cols)


class InRegisters(NamedTuple):
    """GEMMs of wide 16-bit operands and narrow ones, accumulated in fp32.

    The narrow ones are fp32 and `exact`, or are rounded to the wide ones' dtype.
    """

    exact: bool

    def add_product(self, y_NK, x_NI, first_RI, second_RK, scale, beta=1):
        (N, width), R = x_NI.shape, first_RI.shape[0]
        count, columns, grid, blocks = _narrow_launch(N, width, R)
        sums = torch.empty(count, N, R, dtype=torch.float32, device=x_NI.device)
        launch(
            _narrow_kernel, grid,
            x_NI, first_RI, sums, x_NI.stride(0), *first_RI.stride(), scale, N, R, width, columns,
            EXACT=self.exact, WIDEN=_INTERPRETED, **blocks,
        )  # fmt: skip
        h_dtype = torch.float32 if self.exact else x_NI.dtype
        if y_NK is None:
            return sums.sum(0).to(h_dtype)
        h, K = torch.empty(N, R, dtype=h_dtype, device=x_NI.device), y_NK.shape[1]
        grid, blocks = _add_launch(N, K)
        launch(
            _add_kernel, grid,
            y_NK, sums, h, second_RK, y_NK.stride(0), *second_RK.stride(), N, R, K,
            SUMS=count, BETA=beta, EXACT=self.exact, WIDEN=_INTERPRETED, **blocks,
        )  # fmt: skip
        return h

    def gradient_a(self, dh_NR, x_NK):
        R, K = dh_NR.shape[1], x_NK.shape[1]
        return self._over_rows(dh_NR, x_NK, (R, K), (K, 1))

    def gradient_b(self, dy_NK, h_NR):
        R, K = h_NR.shape[1], dy_NK.shape[1]
        return self._over_rows(h_NR, dy_NK, (K, R), (1, R))

    def _over_rows(self, h_NR, x_NK, shape: tuple[int, int], strides: tuple[int, int]):
        """Return hᵀ x in fp32, as a tensor of `shape`, in which R and K have the `strides`."""
        (N, R), K = h_NR.shape, x_NK.shape[1]
        count, rows, grid, blocks = _over_rows_launch(N, K, R)
        sums = torch.empty(count, *shape, dtype=torch.float32, device=x_NK.device)
        launch(
            _over_rows_kernel, grid,
            h_NR, x_NK, sums, x_NK.stride(0), *strides, N, R, K, rows,
            EXACT=self.exact, WIDEN=_INTERPRETED, **blocks,
        )  # fmt: skip
        return sums[0] if count == 1 else sums.sum(0)


# How the kernels are launched, as measured on an H200. Working it out takes as long as a launch.


@functools.lru_cache(maxsize=1024)
def _narrow_launch(N: int, K: int, R: int):
    """Return the number of sums, the columns of each, the grid and the blocks."""
    rank = _rank_block(R)
    if N < 4096 and rank < 64:
        blocks = {"ROWS": 64, "RANK": rank, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    elif rank < 64:
        blocks = {"ROWS": 128, "RANK": rank, "COLUMNS": 64, "num_warps": 4, "num_stages": 4}
    else:
        blocks = {"ROWS": 128, "RANK": rank, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}
    # Few rows need many programs. But every program that adds the product to y reads all sums.
    count = min(8 if N <= 1024 else 4 if N <= 2048 else 2, max(1, K // 256))
    columns = cdiv(cdiv(K, count), blocks["COLUMNS"]) * blocks["COLUMNS"]
    return count, columns, (cdiv(N, blocks["ROWS"]), cdiv(R, rank), count), blocks


@functools.lru_cache(maxsize=1024)
def _add_launch(N: int, K: int):
    """Return the grid and the blocks."""
    blocks = {"ROWS": 64, "RANK": 16, "COLUMNS": 256, "num_warps": 4}
    return (cdiv(N, blocks["ROWS"]), cdiv(K, blocks["COLUMNS"])), blocks


@functools.lru_cache(maxsize=1024)
def _over_rows_launch(N: int, K: int, R: int):
    """Return the number of sums, the rows of each, the grid and the blocks."""
    rank = _rank_block(R)
    blocks = {"ROWS": 64, "RANK": rank, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    programs = cdiv(K, blocks["COLUMNS"]) * cdiv(R, rank)
    # A sum of few rows takes longer to be added up than it saves; nor do too many programs help.
    count = min(16, cdiv(N, 512), max(1, 1024 // programs))
    rows = cdiv(cdiv(N, count), blocks["ROWS"]) * blocks["ROWS"]
    count = cdiv(N, rows)
    return count, rows, (cdiv(K, blocks["COLUMNS"]), cdiv(R, rank), count), blocks


def _rank_block(R: int) -> int:
    return min(64, max(16, next_power_of_2(R)))  # tl.dot needs 16 columns
