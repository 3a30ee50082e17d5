"""Gated linear units without their matrices: activation(gate) * up, in one pass.

    y      = act(gate) * up
    d_gate = dy * up * act'(gate)
    d_up   = dy * act(gate)

    silu(x)      = x σ(x)                        silu'(x) = σ(x) (1 + x (1 - σ(x)))
    gelu(x)      = x Φ(x)                        gelu'(x) = Φ(x) + x φ(x)
    gelu_tanh(x) = x σ(2u), u = √(2/π) (x + 0.044715 x³)
                   since (1 + tanh u) / 2 = σ(2u), which neither overflows nor cancels

Shapes: gate, up, y [..., I], floating point. The activation is computed in fp32 and rounded to y's
dtype before the product, as torch does in `F.silu(gate) * up` for one dtype. Only gate and up are
saved; the backward recomputes the activation.

Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; Hendrycks and Gimpel, "Gaussian Error
Linear Units", arXiv:1606.08415.
"""

from __future__ import annotations

import functools

import torch

from ..launch import launch
from ..recompute import by_torch, recomputable
from ..runtime import as_rows, cdiv, pays, register_op, tl, triton, use_triton
from ..second_derivative import twice_differentiable

MIN_ELEMENTS = 20_000_000  # below this, torch's four kernels take less time (H200, host included)
# One 16-byte load of bf16 per thread and tensor: enough resident programs to saturate bandwidth.
_BLOCK = 1024
_NUM_WARPS = 4


def _y_dtype(gate: torch.Tensor, up: torch.Tensor) -> torch.dtype:
    return torch.promote_types(gate.dtype, up.dtype)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute `swiglu` in plain torch."""
    return torch.nn.functional.silu(gate.to(_y_dtype(gate, up))) * up


def geglu_reference(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none"
) -> torch.Tensor:
    """Compute `geglu` in plain torch."""
    gate = gate.to(_y_dtype(gate, up))
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


@triton.jit
def _activation_and_slope(x, ACTIVATION: tl.constexpr):
    """Return act(x) and act'(x) in fp32; the compiler drops whichever the caller ignores."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * cdf, cdf + x * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        x2 = x * x
        two_u = 1.5957691216057308 * x * (1.0 + 0.044715 * x2)
        s, rest = tl.sigmoid(two_u), tl.sigmoid(-two_u)  # 1 - s would cancel
        slope_2u = 1.5957691216057308 * (1.0 + 0.134145 * x2)
        return x * s, s * (1.0 + x * rest * slope_2u)


@triton.jit
def _row_and_columns(cols, BLOCK: tl.constexpr):
    # Divides before the cast: a division in int64 would cost as much as the kernel's arithmetic.
    blocks = (cols - 1) // BLOCK + 1  # tl.cdiv would overflow just below 2^31
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, cols,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = _row_and_columns(cols, BLOCK)
    mask = col < cols
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask).to(tl.float32)
    activated, _ = _activation_and_slope(gate.to(tl.float32), ACTIVATION)
    y = activated.to(y_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, dy_stride, gate_stride, up_stride, cols,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = _row_and_columns(cols, BLOCK)
    mask = col < cols
    dy_in = tl.load(dy_ptr + row * dy_stride + col, mask=mask)
    dy = dy_in.to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask).to(tl.float32)
    activated, slope = _activation_and_slope(gate.to(tl.float32), ACTIVATION)
    d_gate = dy * up * slope
    d_up = dy * activated.to(dy_in.dtype).to(tl.float32)  # dy has the dtype of y
    tl.store(d_gate_ptr + row * cols + col, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + row * cols + col, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, inputs, outputs, activation) -> None:
    if outputs[0].numel() == 0:
        return
    if all(t.is_contiguous() for t in inputs):
        # One long row, so that no lanes are idle at the end of each row.
        rows, cols, strides = 1, inputs[0].numel(), [0] * len(inputs)
    else:
        inputs = [as_rows(t) for t in inputs]
        (rows, cols), strides = inputs[0].shape, [t.stride(0) for t in inputs]
    launch(
        kernel, (rows * cdiv(cols, _BLOCK),),
        *inputs, *outputs, *strides, cols,
        ACTIVATION=activation, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip


def _fwd(gate, up, activation):
    y = _fwd_fake(gate, up, activation)
    _launch(_glu_fwd_kernel, (gate, up), (y,), activation)
    return y


def _bwd(dy, gate, up, activation):
    grads = _bwd_fake(dy, gate, up, activation)
    _launch(_glu_bwd_kernel, (dy, gate, up), grads, activation)
    return grads


def _fwd_fake(gate, up, activation):
    return gate.new_empty(gate.shape, dtype=_y_dtype(gate, up))


def _bwd_fake(dy, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_glu_fwd = register_op("glu_fwd(Tensor gate, Tensor up, str activation) -> Tensor", _fwd, _fwd_fake)
_glu_bwd = register_op(
    "glu_bwd(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _reference_of(ctx):
    if ctx.activation == "silu":
        return swiglu_reference, ctx.saved_tensors
    approximate = "none" if ctx.activation == "gelu" else "tanh"
    return functools.partial(geglu_reference, approximate=approximate), ctx.saved_tensors


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _glu_fwd(gate, up, activation)

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dy):
        return *_glu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


def _check(name: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(
            f"{name}: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape."
        )
    if not (gate.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{name}: gate {gate.dtype} and up {up.dtype} must be floating point.")
    if gate.device != up.device:
        raise ValueError(f"{name}: gate ({gate.device}) and up ({up.device}) need one device.")


def _has_kernel(gate: torch.Tensor, up: torch.Tensor) -> bool:
    # The kernels compute in fp32, so fp64 runs in torch.
    fits = torch.float64 not in (gate.dtype, up.dtype)
    return fits and use_triton(gate) and pays(gate, MIN_ELEMENTS)


def _fused(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    y = _GLU.apply(gate, up, activation)
    return recomputable(y, lambda gate, up: _glu_fwd(gate, up, activation), (gate, up))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate, up: [..., I], the same shape, any strides; halves of a packed [..., 2I] tensor are
            read in place.

    Returns:
        [..., I], contiguous where the kernel runs, of dtype promote_types(gate.dtype, up.dtype).
        fp64 tensors take `swiglu_reference`.

    Raises:
        ValueError: for different shapes, integer tensors, or two devices.

    Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    _check("swiglu", gate, up)
    if not _has_kernel(gate, up):
        return by_torch(swiglu_reference, (gate, up))
    return _fused(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """Return gelu(gate) * up, with the exact GELU ("none") or its tanh approximation ("tanh").

    Args:
        gate, up: [..., I], the same shape, any strides; halves of a packed [..., 2I] tensor are
            read in place.
        approximate: as in `torch.nn.functional.gelu`.

    Returns:
        [..., I], contiguous where the kernel runs, of dtype promote_types(gate.dtype, up.dtype).
        fp64 tensors take `geglu_reference`.

    Raises:
        ValueError: for different shapes, integer tensors, two devices, or another `approximate`.

    Shazeer, arXiv:2002.05202; Hendrycks and Gimpel, arXiv:1606.08415.
    """
    _check("geglu", gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'geglu: approximate must be "none" or "tanh"; got {approximate!r}.')
    if not _has_kernel(gate, up):

        def reference(gate, up):
            return geglu_reference(gate, up, approximate=approximate)

        return by_torch(reference, (gate, up))
    return _fused(gate, up, "gelu" if approximate == "none" else "gelu_tanh")
