"""An adapter's GEMMs by cuBLAS, of fp32 matrices that were split into bf16 parts.

The three parts of a narrow operand are stacked, so that one bf16 GEMM of three times the rank takes
the place of an fp32 GEMM. `lora_linear.py` explains why that is exact.
"""

from __future__ import annotations

import torch

from ..launch import launch
from ..runtime import cdiv, next_power_of_2, tl, triton

_BLOCK = 1024


@triton.jit
def split(x):
    """Return hi, mid and lo in bf16 (8 bits each), with hi + mid + lo == x."""
    hi = x.to(tl.bfloat16)
    rest = x - hi.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_row(
    m_ptr, out_ptr, stride_r, stride_k, row, col, R, K, EXACT: tl.constexpr
):  # fmt: skip
    """Split a row of m [R, K] into [3R, K] (hi, mid, lo) if EXACT, else [4R, K] (hi three times,
    mid)."""
    mask = col < K
    m = tl.load(m_ptr + row * stride_r + col.to(tl.int64) * stride_k, mask=mask, other=0.0)
    hi, mid, lo = split(m)
    out_ptrs, part = out_ptr + row * K + col, tl.cast(R, tl.int64) * K
    tl.store(out_ptrs, hi, mask=mask)
    tl.store(out_ptrs + part, mid if EXACT else hi, mask=mask)
    tl.store(out_ptrs + 2 * part, lo if EXACT else hi, mask=mask)
    if not EXACT:
        tl.store(out_ptrs + 3 * part, mid, mask=mask)


@triton.jit
def _split_pair_kernel(
    first_ptr, second_ptr, first_out, second_out, stride_r1, stride_k1, stride_r2, stride_k2,
    R, K1, K2, BLOCK: tl.constexpr,
):  # fmt: skip
    """Split the first [R, K1] exactly, and the second [R, K2] into its upper 16 bits."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < R:
        _split_row(first_ptr, first_out, stride_r1, stride_k1, row, col, R, K1, True)
    else:
        _split_row(second_ptr, second_out, stride_r2, stride_k2, row - R, col, R, K2, False)


@triton.jit
def _gather_parts_kernel(
    sums_ptr, h_ptr, parts_ptr, scale, N, R, SUMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the SUMS blocks of sums [N, SUMS R], scale the total, and store it as h [N, R] and as its
    parts [N, 4R] (hi, mid, lo, hi)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.cast(N, tl.int64) * R
    row, col = i // R, i % R
    sums_ptrs = sums_ptr + row * (SUMS * R) + col
    h = tl.load(sums_ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, SUMS):
        h += tl.load(sums_ptrs + part * R, mask=mask, other=0.0)
    h *= scale
    tl.store(h_ptr + i, h, mask=mask)
    hi, mid, lo = split(h)
    parts_ptrs = parts_ptr + row * (4 * R) + col
    tl.store(parts_ptrs, hi, mask=mask)
    tl.store(parts_ptrs + R, mid, mask=mask)
    tl.store(parts_ptrs + 2 * R, lo, mask=mask)
    tl.store(parts_ptrs + 3 * R, hi, mask=mask)


def split_pair(first_RK: torch.Tensor, second_RK: torch.Tensor):
    """Return the bf16 parts of both matrices, stacked: [3R, K1] and [4R, K2].

    The first is split into three parts that hold all of its 24 bits, the second into two that hold
    the upper 16. The larger one of these two is stored three times.
    """
    (R, K1), K2 = first_RK.shape, second_RK.shape[1]
    like = {"dtype": torch.bfloat16, "device": first_RK.device}
    first, second = torch.empty(3 * R, K1, **like), torch.empty(4 * R, K2, **like)
    widest = max(K1, K2)
    block = min(_BLOCK, next_power_of_2(widest))
    launch(
        _split_pair_kernel, (2 * R, cdiv(widest, block)),
        first_RK, second_RK, first, second, *first_RK.stride(), *second_RK.stride(), R, K1, K2,
        block,
    )  # fmt: skip
    return first, second


def gather_parts(sums: torch.Tensor, R: int, scale: float):
    """Return h [N, R], the scaled total of sums [N, R or 3R], and its parts [N, 4R]."""
    N = len(sums)
    h, parts = sums.new_empty(N, R), sums.new_empty(N, 4 * R, dtype=torch.bfloat16)
    launch(
        _gather_parts_kernel, (cdiv(N * R, _BLOCK),),
        sums, h, parts, scale, N, R, SUMS=sums.shape[1] // R, BLOCK=_BLOCK,
    )  # fmt: skip
    return h, parts


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in fp32 for 16-bit a and b."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class InParts:
    """GEMMs of wide bf16 and narrow fp32 operands."""

    @staticmethod
    def add_product(y_NK, x_NI, first_RI, second_RK, scale, beta=1):
        first, second = split_pair(first_RI, second_RK)
        h, parts = gather_parts(matmul_fp32(x_NI, first.t()), len(first_RI), scale)
        if y_NK is not None:
            y_NK.addmm_(parts, second, beta=beta)
        return h

    @staticmethod
    def gradient_a(dh_NR, x_NK):
        R = dh_NR.shape[1]
        _, parts = gather_parts(dh_NR, R, 1.0)
        return matmul_fp32(parts[:, : 3 * R].t(), x_NK).view(3, R, -1).sum(0)

    @staticmethod
    def gradient_b(dy_NK, h_NR):
        R = h_NR.shape[1]
        _, parts = gather_parts(h_NR, R, 1.0)
        return matmul_fp32(dy_NK.t(), parts[:, : 3 * R]).view(-1, 3, R).sum(1)
