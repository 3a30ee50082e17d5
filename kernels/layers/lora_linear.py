"""A linear layer with low-rank adapters, as one operation.

    y = x Wᵀ + b + Σ s (D(x) Aᵀ) Bᵀ

Shapes: x [..., I], W [O, I], b [O], A [R, I], B [O, R], y [..., O]; in code N is rows of x. D is
dropout, s a number. One summand per adapter.

Backward, with h = s D(x) Aᵀ, which forward saves in addition to x, and dh = s dy B:
    dx = dy W + Σ D(dh A)    dA = dhᵀ D(x)    dB = dyᵀ h    dW = dyᵀ x    db = Σ dy

x is kept once, in the dtype of the base's product, whatever the adapters' dtype. The adapters'
products are written to y and dx first, and the base's GEMMs add theirs: these read what they add to
while they compute, which a pass of its own would not hide. Dropout draws a seed and makes its mask
from that, in backward again.

Precision of the adapters' GEMMs:
- x and the adapters have the same dtype (under autocast, the adapters are rounded to x's): in that
  dtype, with fp32 accumulation.
- bf16 x, fp32 adapters (PEFT's default): as exact as PEFT's fp32 GEMMs, but without their fp32
  copy of x. In every GEMM one operand is wide and bf16, and the other is narrow and fp32. The
  narrow one is split into three bf16 parts, which together hold its 24 bits, so three bf16 GEMMs
  are exact up to the fp32 sum. Where the result is rounded to bf16 anyway (y and dx), 16 bits of
  both operands suffice.
- otherwise, and without Triton: in the adapters' dtype.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..autograd import depends_on, first_derivative_only
from ..runtime import as_rows, call_on_device, without_autocast
from .lora_products import products_for


class Adapter(NamedTuple):
    """A low-rank adapter: A [R, I], B [O, R], their scale, and the dropout probability of x."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    dropout: float = 0.0


def lora_linear_reference(x, weight, bias, adapters, *, keeps=None):
    """Compute `lora_linear` in differentiable torch; `keeps` holds a dropout mask per adapter."""
    y = F.linear(x, weight, bias)
    total = y
    for i, (A, B, scale, dropout) in enumerate(adapters):
        x_in = x.to(A.dtype)
        if dropout:
            x_in = x_in * keeps[i] / (1.0 - dropout)
        total = total + F.linear(F.linear(x_in, A), B) * scale
    return total.to(y.dtype)


def dropout_mask(x: torch.Tensor, seed: int, probability: float) -> torch.Tensor:
    """Return a bool tensor of x's shape, False with `probability`; deterministic for a seed."""
    generator = torch.Generator(device=x.device)
    generator.manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return keep.bernoulli_(1.0 - probability, generator=generator)


def _draw_seed() -> int:
    # From the CPU's generator: this does not wait for the device, and checkpointing restores it.
    return int(torch.randint(2**62, ()))


# --- autograd ------------------------------------------------------------------------------------


class _LoRALinear(torch.autograd.Function):
    """Apply weight, bias and adapters to x; or only the adapters, added to the base output `y`.

    `settings` holds (products, scale, dropout, seed) of each adapter, and `matrices` its A and B.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, y, settings, *matrices):
        x_NI = as_rows(x)
        width = weight.shape[0] if y is None else y.shape[-1]
        y_NO = torch.empty(len(x_NI), width, dtype=(x if y is None else y).dtype, device=x.device)
        if y is not None:
            y_NO.view(y.shape).copy_(y)
        elif bias is not None:
            y_NO.copy_(bias)
        has_y = y is not None or bias is not None
        needs, kept = ctx.needs_input_grad, []
        for i, (products, scale, dropout, seed) in enumerate(settings):
            A, B = matrices[2 * i], matrices[2 * i + 1]
            D_NI = x_NI * dropout_mask(x_NI, seed, dropout) if dropout else x_NI
            h = products.add_product(y_NO, D_NI, A, B.t(), scale, int(has_y))
            kept.append(h if needs[6 + 2 * i] else None)
            has_y = True
        if y is None:
            y_NO.addmm_(x_NI, weight.to(y_NO.dtype).t(), beta=int(has_y))
        keeps_x = needs[1] or any(needs[5::2])
        if not keeps_x:
            depends_on(ctx, x)
        ctx.save_for_backward(x if keeps_x else None, weight, *matrices, *kept)
        ctx.settings, ctx.x_shape, ctx.x_dtype = settings, x.shape, x.dtype
        return y_NO if x.dim() == 2 else y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        with without_autocast(dy):
            return call_on_device(dy, _LoRALinear._backward, ctx, dy)

    @staticmethod
    def _backward(ctx, dy):
        x, weight, *saved = ctx.saved_tensors
        count = len(ctx.settings)
        matrices, kept = saved[: 2 * count], saved[2 * count :]
        needs = ctx.needs_input_grad
        needs_x, needs_weight, needs_bias, needs_y = needs[:4]
        dy_NO, x_NI = as_rows(dy), None if x is None else as_rows(x)

        dx_NI, has_dx, grads = None, False, []
        if needs_x:
            shape = len(dy_NO), ctx.x_shape[-1]
            dx_NI = torch.empty(shape, dtype=ctx.x_dtype, device=dy.device)
        for i, (products, scale, dropout, seed) in enumerate(ctx.settings):
            A, B = matrices[2 * i], matrices[2 * i + 1]
            needs_A, needs_B = needs[5 + 2 * i], needs[6 + 2 * i]
            dA = dB = None
            if needs_B:
                dB = products.gradient_b(dy_NO, kept[i])
            if needs_A or needs_x:
                wide_NI = dx_NI if x_NI is None else x_NI
                keep = dropout_mask(wide_NI, seed, dropout) if dropout else None
                if dx_NI is None or keep is None:
                    dh = products.add_product(dx_NI, dy_NO, B.t(), A, scale, int(has_dx))
                else:
                    part_NI = torch.empty_like(dx_NI)
                    dh = products.add_product(part_NI, dy_NO, B.t(), A, scale, 0)
                    part_NI *= keep
                    dx_NI = dx_NI.add_(part_NI) if has_dx else part_NI
                if needs_A:
                    dA = products.gradient_a(dh, x_NI if keep is None else x_NI * keep)
                has_dx = True
            grads += [dA, dB]
        if dx_NI is not None:
            if weight is not None:
                dx_NI.addmm_(dy_NO, weight.to(dx_NI.dtype), beta=int(has_dx))
            elif not has_dx:
                dx_NI.zero_()
        return (
            None if dx_NI is None else dx_NI.view(ctx.x_shape),
            dy_NO.t() @ x_NI if needs_weight and x_NI is not None else None,
            dy_NO.sum(0) if needs_bias else None,
            dy if needs_y else None,
            None,
            *grads,  # autograd casts all of these to their tensors' dtypes
        )


def _is_autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # as in torch


def _apply(x, weight, bias, y, adapters: Sequence[Adapter]) -> torch.Tensor:
    autocast = _is_autocast(x)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y_dtype = x.dtype if y is None else y.dtype
    settings, matrices = [], []
    for A, B, scale, dropout in adapters:
        seed, scale = None, float(scale)  # NumPy's numbers are no arguments of a kernel
        if dropout:
            seed, scale = _draw_seed(), scale / (1.0 - dropout) if dropout < 1.0 else 0.0
        settings.append((products_for(x, y_dtype, A, autocast), scale, dropout, seed))
        matrices += A, B
    return call_on_device(x, _LoRALinear.apply, x, weight, bias, y, settings, *matrices)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[Adapter],
) -> torch.Tensor:
    """Return y = x Wᵀ + b + Σ scale (D(x) Aᵀ) Bᵀ, summed over one or more `adapters`.

    Args:
        x: [..., I], floating point.
        weight: [O, I], of x's dtype, or of any dtype under autocast; trainable or frozen.
        bias: [O] or None.
        adapters: A [R, I] and B [O, R] of one dtype; D zeroes each element of x with the adapter's
            `dropout`, and divides the others by 1 - dropout.

    Returns y [..., O], of the dtype of x Wᵀ. Differentiable once.

    Raises ValueError if the shapes or dtypes of an adapter, or the weight's dtype, do not fit.

    Hu et al., arXiv:2106.09685.
    """
    _check(x, weight.shape[0], adapters)
    other = weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)
    if other and not _is_autocast(x):
        raise ValueError(f"lora_linear: weight and bias must be {x.dtype}, as x is")
    return _apply(x, weight, bias, None, adapters)


def add_adapters(y: torch.Tensor, x: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Return y + Σ scale (D(x) Aᵀ) Bᵀ, in y's dtype, for a base output y that is known already.

    y is [..., O] and is not changed; everything else is as in `lora_linear`.
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
