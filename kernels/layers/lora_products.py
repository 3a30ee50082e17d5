"""GEMMs of a wide operand (many rows and columns) and a narrow one (an adapter's rank).

`lora_linear.py` describes how the operands' dtypes determine the way that each is computed.
"""

from __future__ import annotations

import torch

from ..launch import launch
from ..runtime import cdiv, next_power_of_2, tl, triton, use_triton

_BLOCK = 1024


# --- three bf16 parts of an fp32 number ---------------------------------------------------------


@triton.jit
def _split(x):
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
    hi, mid, lo = _split(m)
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
def _store_parts(parts_ptr, h, row, col, R, mask):
    """Store the parts of h in [N, 4R] (hi, mid, lo, hi)."""
    hi, mid, lo = _split(h)
    parts_ptrs = parts_ptr + row * (4 * R) + col
    tl.store(parts_ptrs, hi, mask=mask)
    tl.store(parts_ptrs + R, mid, mask=mask)
    tl.store(parts_ptrs + 2 * R, lo, mask=mask)
    tl.store(parts_ptrs + 3 * R, hi, mask=mask)


@triton.jit
def _gather_parts_kernel(
    sums_ptr, parts_ptr, h_ptr, h_parts_ptr, scale, N, R,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the three [N, R] blocks of `sums` [N, 3R], scale the total, and split it.

    Forward also stores the total as h [N, R]; backward also splits the saved h.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.cast(N, tl.int64) * R
    row, col = i // R, i % R
    sums_ptrs = sums_ptr + row * (3 * R) + col
    total = tl.load(sums_ptrs, mask=mask, other=0.0)
    total += tl.load(sums_ptrs + R, mask=mask, other=0.0)
    total += tl.load(sums_ptrs + 2 * R, mask=mask, other=0.0)
    total *= scale
    _store_parts(parts_ptr, total, row, col, R, mask)
    if FORWARD:
        tl.store(h_ptr + i, total, mask=mask)
    if BACKWARD:
        kept = tl.load(h_ptr + i, mask=mask, other=0.0)
        _store_parts(h_parts_ptr, kept, row, col, R, mask)


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


def _mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in fp32 for 16-bit a and b."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# --- GEMMs of a wide operand and a narrow one ----------------------------------------------------
# The wide operand is projected to the rank by the first of two matrices, and back by the second:
# (A, Bᵀ) in forward, (Bᵀ, A) in backward. `prepare` returns them in the form that the GEMMs take.


class OneDtype:
    """All operands have one dtype."""

    @staticmethod
    def prepare(first_RK, second_RK):
        return first_RK, second_RK

    @staticmethod
    def project(x_NK, first, scale):
        """Return h = scale x firstᵀ [N, R] twice: to save, and as the functions below take it."""
        h = torch.addmm(x_NK.new_empty(1), x_NK, first.t(), beta=0, alpha=scale)
        return h, h

    @classmethod
    def project_backward(cls, dy_NK, first, scale, h):
        """Return the projected dy and the saved h, both as the functions below take them."""
        return cls.project(dy_NK, first, scale)[1], h

    @staticmethod
    def add(y_NK, h_NR, second, beta=1):
        """Compute y = beta y + h second, in place."""
        y_NK.addmm_(h_NR, second, beta=beta)

    @staticmethod
    def sum_over_rows(h_NR, x_NK):
        """Return hᵀ x [R, K]; on a GPU, in fp32 for 16-bit operands."""
        if x_NK.is_cuda and x_NK.element_size() == 2:
            return _mm32(h_NR.t(), x_NK)
        return torch.mm(h_NR.t(), x_NK)


class Widened(OneDtype):
    """The wide operand is cast to the narrow one's dtype."""

    @staticmethod
    def project(x_NK, first, scale):
        return OneDtype.project(x_NK.to(first.dtype), first, scale)

    @staticmethod
    def add(y_NK, h_NR, second, beta=1):
        product = h_NR @ second
        y_NK.add_(product) if beta else y_NK.copy_(product)

    @staticmethod
    def sum_over_rows(h_NR, x_NK):
        return torch.mm(h_NR.t(), x_NK.to(h_NR.dtype))


class Split(OneDtype):
    """The wide operand is bf16; the narrow one is fp32, and is split into bf16 parts."""

    prepare = staticmethod(split_pair)

    @staticmethod
    def project(x_NK, first, scale):
        N, R = len(x_NK), len(first) // 3
        sums = _mm32(x_NK, first.t())
        h, parts = sums.new_empty(N, R), x_NK.new_empty(N, 4 * R)
        launch(
            _gather_parts_kernel, (cdiv(N * R, _BLOCK),),
            sums, parts, h, parts, scale, N, R, True, False, _BLOCK,
        )  # fmt: skip
        return h, parts

    @classmethod
    def project_backward(cls, dy_NK, first, scale, h):
        N, R = len(dy_NK), len(first) // 3
        sums = _mm32(dy_NK, first.t())
        parts = dy_NK.new_empty(N, 4 * R)
        h_parts = parts if h is None else torch.empty_like(parts)
        launch(
            _gather_parts_kernel, (cdiv(N * R, _BLOCK),),
            sums, parts, h, h_parts, scale, N, R, False, h is not None, _BLOCK,
        )  # fmt: skip
        return parts, h_parts

    @staticmethod
    def add(y_NK, parts, second, beta=1):
        y_NK.addmm_(parts, second, beta=beta)

    @staticmethod
    def sum_over_rows(parts, x_NK):
        R = parts.shape[1] // 4
        return _mm32(parts[:, : 3 * R].t(), x_NK).view(3, R, -1).sum(0)


def products_for(x_NI: torch.Tensor, y_NO: torch.Tensor, A: torch.Tensor) -> type[OneDtype]:
    """Return the class that computes the GEMMs of x, y and an adapter of A's dtype."""
    if x_NI.dtype == y_NO.dtype == A.dtype:
        return OneDtype
    splits = x_NI.dtype == y_NO.dtype == torch.bfloat16 and A.dtype == torch.float32
    return Split if splits and use_triton(x_NI) and x_NI.numel() else Widened
