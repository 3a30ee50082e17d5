"""A linear layer with low-rank adapters, as one operation.

    y = x Wᵀ + b + Σ s (D(x) Aᵀ) Bᵀ

Shapes: x [..., I], W [O, I], b [O], A [R, I], B [O, R], y [..., O]; in code N is rows of x. D is
dropout, s a number. One summand per adapter.

Backward, with h = s D(x) Aᵀ, which forward keeps beside x, and dh = s dy B:
    dx = dy W + Σ D(dh A)    dA = dhᵀ D(x)    dB = dyᵀ h    dW = dyᵀ x    db = Σ dy

x is kept once, in the dtype of the base's product, whatever the adapters' dtype. Their products are
added to y and dx in place. Dropout draws a seed and makes its mask from that, in backward again.

What the adapters' products are computed in:
- x and the adapters have one dtype (under autocast they are cast to its own): in that, with fp32
  accumulation.
- bf16 x, fp32 adapters (PEFT's default): exactly, as by fp32 products of a widened x, which is what
  PEFT does; but a large x is not widened. In every product one operand is wide and bf16 and the
  other narrow and fp32. The narrow one is split into three bf16 parts, which together hold its 24
  bits, so one bf16 product of three times the rank is exact up to the fp32 sum. Where the result
  is rounded to bf16 anyway (y and dx), 16 bits of both operands suffice.
- otherwise, and without Triton: in the adapters' dtype.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime import as_rows, cdiv, next_power_of_2, on_device, tl, triton, use_triton

MIN_ELEMENTS = 1 << 22  # of x: below, the launches take longer than the products
_BLOCK = 1024


class Adapter(NamedTuple):
    """A [R, I], B [O, R], their factor, the probability that dropout zeroes an element of x."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    dropout: float = 0.0


def lora_linear_reference(x, weight, bias, adapters, *, keeps=None):
    """`lora_linear` in differentiable torch; `keeps` are the masks of the adapters with dropout."""
    y = F.linear(x, weight, bias)
    total = y
    for i, (A, B, scale, dropout) in enumerate(adapters):
        x_in = x.to(A.dtype)
        if dropout:
            x_in = x_in * keeps[i] / (1.0 - dropout)
        total = total + F.linear(F.linear(x_in, A), B) * scale
    return total.to(y.dtype)


# --- three bf16 parts of an fp32 number ---------------------------------------------------------


@triton.jit
def _split(x):
    """hi + mid + lo == x, each with the 8 bits of a bf16."""
    hi = x.to(tl.bfloat16)
    rest = x - hi.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_pair_kernel(
    first_ptr, second_ptr, first_out, second_out, stride_r1, stride_k1, stride_r2, stride_k2,
    R, K1, K2, BLOCK: tl.constexpr,
):  # fmt: skip
    """first [R, K1] to [3R, K1] (hi, mid, lo), second [R, K2] to [4R, K2] (hi, hi, hi, mid)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = col.to(tl.int64)
    if row < R:
        mask = col < K1
        m = tl.load(first_ptr + row * stride_r1 + wide * stride_k1, mask=mask, other=0.0)
        hi, mid, lo = _split(m)
        out_ptrs, part = first_out + row * K1 + col, tl.cast(R, tl.int64) * K1
        tl.store(out_ptrs, hi, mask=mask)
        tl.store(out_ptrs + part, mid, mask=mask)
        tl.store(out_ptrs + 2 * part, lo, mask=mask)
    else:
        row -= R
        mask = col < K2
        m = tl.load(second_ptr + row * stride_r2 + wide * stride_k2, mask=mask, other=0.0)
        hi, mid, lo = _split(m)
        out_ptrs, part = second_out + row * K2 + col, tl.cast(R, tl.int64) * K2
        tl.store(out_ptrs, hi, mask=mask)
        tl.store(out_ptrs + part, hi, mask=mask)
        tl.store(out_ptrs + 2 * part, hi, mask=mask)
        tl.store(out_ptrs + 3 * part, mid, mask=mask)


@triton.jit
def _store_parts(parts_ptr, h, row, col, R, mask):
    """One of [N, 4R] (hi, mid, lo, hi)."""
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
    """Scale the sum of sums [N, 3R] and split it; forward keeps it as h [N, R], and backward splits
    the h that was kept, too."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N * R
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


def _split_pair(first_RK: torch.Tensor, second_RK: torch.Tensor):
    """Split the first into three parts that hold all of its bits, and the second into two that
    hold 16, of which the larger stands there thrice."""
    (R, K1), K2 = first_RK.shape, second_RK.shape[1]
    like = {"dtype": torch.bfloat16, "device": first_RK.device}
    first, second = torch.empty(3 * R, K1, **like), torch.empty(4 * R, K2, **like)
    widest = max(K1, K2)
    block = min(_BLOCK, next_power_of_2(widest))
    _split_pair_kernel[(2 * R, cdiv(widest, block))](
        first_RK,
        second_RK,
        first,
        second,
        *first_RK.stride(),
        *second_RK.stride(),
        R,
        K1,
        K2,
        block,
    )
    return first, second


def _mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in fp32 for 16-bit a and b."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# --- products of a wide operand, of many rows and columns, and a narrow one -----------------------
# `prepared` is the pair of matrices that the wide operand is multiplied with and that the result
# is: (A, Bᵀ) in the forward pass and (Bᵀ, A) in the backward pass, as the products take them.


class _OneDtype:
    """All in one dtype."""

    @staticmethod
    def prepared(first_RK, second_RK):
        return first_RK, second_RK

    @staticmethod
    def narrow(x_NK, first, scale):
        """h = scale x firstᵀ [N, R], once to be kept and once as the functions below take it."""
        h = torch.addmm(x_NK.new_empty(1), x_NK, first.t(), beta=0, alpha=scale)
        return h, h

    @classmethod
    def narrow_again(cls, dy_NK, first, scale, h):
        """`narrow` in the backward pass: the second of it, and that of the h that was kept."""
        return cls.narrow(dy_NK, first, scale)[1], h

    @staticmethod
    def add(y_NK, h_NR, second, beta=1):
        """y = beta y + h second, in place."""
        y_NK.addmm_(h_NR, second, beta=beta)

    @staticmethod
    def over_rows(h_NR, x_NK):
        """hᵀ x [R, K]; of 16-bit operands in fp32 where the device can."""
        if x_NK.is_cuda and x_NK.element_size() == 2:
            return _mm32(h_NR.t(), x_NK)
        return torch.mm(h_NR.t(), x_NK)


class _Widened(_OneDtype):
    """The wide one is cast to the narrow one's dtype."""

    @staticmethod
    def narrow(x_NK, first, scale):
        return _OneDtype.narrow(x_NK.to(first.dtype), first, scale)

    @staticmethod
    def add(y_NK, h_NR, second, beta=1):
        product = h_NR @ second
        y_NK.add_(product) if beta else y_NK.copy_(product)

    @staticmethod
    def over_rows(h_NR, x_NK):
        return torch.mm(h_NR.t(), x_NK.to(h_NR.dtype))


class _Split(_OneDtype):
    """The wide one bf16, the narrow one fp32, in bf16 parts."""

    prepared = staticmethod(_split_pair)

    @staticmethod
    def narrow(x_NK, first, scale):
        N, R = len(x_NK), len(first) // 3
        sums = _mm32(x_NK, first.t())
        h, parts = sums.new_empty(N, R), x_NK.new_empty(N, 4 * R)
        _gather_parts_kernel[(cdiv(N * R, _BLOCK),)](
            sums, parts, h, parts, scale, N, R, True, False, _BLOCK
        )
        return h, parts

    @classmethod
    def narrow_again(cls, dy_NK, first, scale, h):
        N, R = len(dy_NK), len(first) // 3
        sums = _mm32(dy_NK, first.t())
        parts = dy_NK.new_empty(N, 4 * R)
        h_parts = parts if h is None else torch.empty_like(parts)
        _gather_parts_kernel[(cdiv(N * R, _BLOCK),)](
            sums, parts, h, h_parts, scale, N, R, False, h is not None, _BLOCK
        )
        return parts, h_parts

    @staticmethod
    def add(y_NK, parts, second, beta=1):
        y_NK.addmm_(parts, second, beta=beta)

    @staticmethod
    def over_rows(parts, x_NK):
        R = parts.shape[1] // 4
        return _mm32(parts[:, : 3 * R].t(), x_NK).view(3, R, -1).sum(0)


def _products(x_NI: torch.Tensor, y_NO: torch.Tensor, A: torch.Tensor):
    if x_NI.dtype == y_NO.dtype == A.dtype:
        return _OneDtype
    splits = x_NI.dtype == y_NO.dtype == torch.bfloat16 and A.dtype == torch.float32
    return _Split if splits and use_triton(x_NI) and x_NI.numel() else _Widened


def dropout_mask(x: torch.Tensor, seed: int, probability: float) -> torch.Tensor:
    """Return a bool tensor of x's shape, False with `probability`; the same for the same seed."""
    generator = torch.Generator(device=x.device)
    generator.manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return keep.bernoulli_(1.0 - probability, generator=generator)


def _draw_seed() -> int:
    # From the CPU's generator: no waiting for the device, and checkpointing restores it.
    return int(torch.randint(2**62, ()))


# --- autograd ------------------------------------------------------------------------------------


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(matrices: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    return (m if dtype is None else m.to(dtype) for m in matrices)


def _without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    if _autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _LoRALinear(torch.autograd.Function):
    """Of x, weight and bias, or of x and the base's own product `y`.

    `settings` holds (scale, dropout) of each adapter, `matrices` A and B of each; under autocast
    `dtype` is what they are cast to.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, y, dtype, settings, *matrices):
        x_NI = as_rows(x)
        if y is None:
            y_NO = F.linear(x_NI, weight, bias)
        else:
            y_NO = torch.empty(len(x_NI), y.shape[-1], dtype=y.dtype, device=y.device)
            y_NO.view(y.shape).copy_(y)
        ctx.plans, kept = [], []
        with _without_autocast(x), on_device(x):
            for i, (scale, dropout) in enumerate(settings):
                A, B = _cast(matrices[2 * i : 2 * i + 2], dtype)
                products = _products(x_NI, y_NO, A)
                seed = _draw_seed() if dropout else None
                D_NI = x_NI * dropout_mask(x_NI, seed, dropout) if dropout else x_NI
                scale = scale / (1.0 - dropout)
                first, second = products.prepared(A, B.t())
                h, operand = products.narrow(D_NI, first, scale)
                products.add(y_NO, operand, second)
                ctx.plans.append((products, scale, dropout, seed))
                kept.append(h if ctx.needs_input_grad[7 + 2 * i] else None)
        keeps_x = any((ctx.needs_input_grad[1], *ctx.needs_input_grad[6::2]))
        ctx.save_for_backward(x if keeps_x else None, weight, *matrices, *kept)
        ctx.dtype, ctx.x_shape, ctx.x_dtype = dtype, x.shape, x.dtype
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with _without_autocast(dy), on_device(dy):
            return _LoRALinear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx, dy):
        x, weight, *saved = ctx.saved_tensors
        count = len(ctx.plans)
        matrices, kept = saved[: 2 * count], saved[2 * count :]
        needs_x, needs_weight, needs_bias, needs_y = ctx.needs_input_grad[:4]
        dy_NO, x_NI = as_rows(dy), None if x is None else as_rows(x)

        dx_NI, started = None, weight is not None
        if needs_x and started:
            dx_NI = dy_NO @ weight.to(dy.dtype)
        elif needs_x:
            shape = len(dy_NO), ctx.x_shape[-1]
            dx_NI = torch.empty(shape, dtype=ctx.x_dtype, device=dy.device)
        grads = []
        for i, (products, scale, dropout, seed) in enumerate(ctx.plans):
            A, B = _cast(matrices[2 * i : 2 * i + 2], ctx.dtype)
            needs_A, needs_B = ctx.needs_input_grad[6 + 2 * i : 8 + 2 * i]
            dA = dB = None
            first, second = products.prepared(B.t(), A)
            operand, h = products.narrow_again(dy_NO, first, scale, kept[i])
            if needs_B:
                dB = products.over_rows(h, dy_NO).t().to(matrices[2 * i + 1])
            if needs_A or needs_x:
                keep = None
                if dropout:
                    wide = x_NI if dx_NI is None else dx_NI
                    keep = dropout_mask(wide, seed, dropout)
                if needs_A:
                    D_NI = x_NI if keep is None else x_NI * keep
                    dA = products.over_rows(operand, D_NI).to(matrices[2 * i])
                if dx_NI is not None and keep is None:
                    products.add(dx_NI, operand, second, beta=int(started))
                elif dx_NI is not None and keep is not None:
                    part = torch.empty_like(dx_NI)
                    products.add(part, operand, second, beta=0)
                    part *= keep
                    dx_NI = dx_NI.add_(part) if started else part
                started = True
            grads += [dA, dB]
        return (
            None if dx_NI is None else dx_NI.view(ctx.x_shape),
            (dy_NO.t() @ x_NI).to(weight.dtype) if needs_weight and x_NI is not None else None,
            dy_NO.sum(0) if needs_bias else None,
            dy if needs_y else None,
            None,
            None,
            *grads,
        )


def _apply(x, weight, bias, y, adapters: Sequence[Adapter]) -> torch.Tensor:
    settings = tuple((float(a.scale), a.dropout) for a in adapters)
    matrices = [matrix for a in adapters for matrix in (a.A, a.B)]
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    return _LoRALinear.apply(x, weight, bias, y, dtype, settings, *matrices)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[Adapter],
) -> torch.Tensor:
    """y = x Wᵀ + b + Σ scale (D(x) Aᵀ) Bᵀ, over `adapters`, of which there is at least one.

    Args:
        x: [..., I], floating point.
        weight: [O, I], of x's dtype, or any under autocast. Trainable or not.
        bias: [O] or None.
        adapters: A [R, I] and B [O, R] of one dtype; D zeroes each element of x with the adapter's
            `dropout`, and divides the others by 1 - dropout.

    Returns y [..., O], of the dtype of x Wᵀ. Differentiable once.

    Raises ValueError for matrices that do not fit each other.

    Hu et al., arXiv:2106.09685.
    """
    _check(x, weight.shape[0], adapters)
    return _apply(x, weight, bias, None, adapters)


def add_adapters(y: torch.Tensor, x: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """y + Σ scale (D(x) Aᵀ) Bᵀ, of y's dtype: `lora_linear` where something else made x Wᵀ + b.

    y is [..., O], and not changed; everything else as in `lora_linear`.
    """
    _check(x, y.shape[-1], adapters)
    return _apply(x, None, None, y, adapters)


def _check(x: torch.Tensor, width: int, adapters: Sequence[Adapter]) -> None:
    for A, B, *_ in adapters:
        if A.shape[1] != x.shape[-1] or B.shape != (width, A.shape[0]) or A.dtype != B.dtype:
            raise ValueError(
                f"lora_linear: A {A.dtype} {tuple(A.shape)} and B {B.dtype} {tuple(B.shape)} must "
                f"be [R, {x.shape[-1]}] and [{width}, R], of one dtype"
            )
