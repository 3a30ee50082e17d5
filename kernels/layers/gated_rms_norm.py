"""RMSNorm with a gate: y = weight * norm(x) * act(gate), or y = weight * norm(x * act(gate)).

    norm(u) = u * rstd over each group of W neighboring columns, rstd = 1 / sqrt(mean(u^2) + eps)
    act(g)  = g σ(g) (silu) or σ(g) (sigmoid)

Shapes: x, gate, y [..., H]; weight [H]; rstd [..., G], fp32, for G = H / W groups. In kernels R is
rows. Dtypes: x, gate and weight are fp32, bf16 or fp16 each; all arithmetic is fp32 (fp64 on the
torch path).

Backward, with u = x (norm first) or x * act(gate) (gate first), xhat = u * rstd:
    norm first:  n = dy * act * weight,  d_act = dy * weight * xhat,  dweight = Σ dy * act * xhat
    gate first:  n = dy * weight,        d_act = du * x,              dweight = Σ dy * xhat
    du = rstd * (n - xhat * mean(n * xhat)),  dx = du (* act if gate first),  dgate = d_act * act'

Forward keeps x, gate, weight and rstd. Backward is persistent: each program walks over rows of one
group, keeps its part of dweight in registers, and writes a row of fp32 partials, which torch sums.

Paper: Dao and Gu, "Transformers are SSMs", 2024, arXiv:2405.21060 (Mamba-2, gate first); norm first
in Gated DeltaNet, Yang et al., 2024, arXiv:2412.06464.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..launch import launch
from ..runtime import as_rows, cdiv, num_sms, register_op, tl, triton
from ..second_derivative import twice_differentiable
from .norm import FWD_TILES, MAX_H, check_input, has_kernel, tile

MIN_ELEMENTS = 1 << 20  # below this, dozens of torch kernels take no more time than two launches
# As FWD_TILES, then programs per SM: besides x, gate and dy, a program holds a partial of dweight.
_BWD_TILES = (
    (1024, 2048, 8, 3),
    (4096, 4096, 16, 1),
    (16384, 16384, 32, 1),
    (MAX_H, 16384, 32, 1),
)


def gated_rms_norm_reference(
    x, gate, weight, *, eps, group_size=None, gate_first=False, cast_first=True, activation="silu"
):
    """Compute `gated_rms_norm` in differentiable torch, in fp32 (in fp64 for fp64 input)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    activated = (F.silu if activation == "silu" else torch.sigmoid)(gate.to(dtype))
    u = x.to(dtype) * activated if gate_first else x.to(dtype)
    width = group_size or x.shape[-1]
    groups = u.unflatten(-1, (x.shape[-1] // width, width))
    xhat = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = weight * xhat.to(x.dtype) if cast_first else weight.to(dtype) * xhat
    if gate_first:
        return y if cast_first else y.to(x.dtype)
    return (y * activated).to(x.dtype)


@triton.jit
def _activation(gate, SIGMOID: tl.constexpr):
    """Return act(gate) and act'(gate) in fp32."""
    s = tl.sigmoid(gate)
    if SIGMOID:
        return s, s * (1.0 - s)
    return gate * s, s * (1.0 + gate * (1.0 - s))


@triton.jit
def _round(value, dtype: tl.constexpr, APPLY: tl.constexpr):
    return value.to(dtype).to(tl.float32) if APPLY else value


@triton.jit
def _gated_rms_norm_fwd_kernel(
    x_ptr,  # [R, H], rows x_stride apart
    gate_ptr,  # [R, H], rows gate_stride apart
    weight_ptr,  # [H]
    y_ptr,  # [R, H] contiguous
    rstd_ptr,  # [R, G] fp32
    x_stride, gate_stride, R, W, eps,
    GATE_FIRST: tl.constexpr, CAST_FIRST: tl.constexpr, SIGMOID: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,  # round weight * xhat to x's dtype before the gate is applied
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Normalize, in program (i, g), group g of BLOCK_R rows from row i * BLOCK_R on."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group, groups = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK_W)
    col = group * W + lane
    mask = (row < R)[:, None] & (lane < W)[None, :]

    x_in = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + col, mask=lane < W, other=0.0).to(tl.float32)[None, :]
    activated, _ = _activation(gate.to(tl.float32), SIGMOID)
    u = x_in.to(tl.float32)
    if GATE_FIRST:
        u *= activated
    rstd = tl.rsqrt(tl.sum(u * u, 1) / W + eps)
    tl.store(rstd_ptr + row * groups + group, rstd, mask=row < R)

    y = weight * _round(u * rstd[:, None], x_in.dtype, CAST_FIRST)
    if not GATE_FIRST:
        y = _round(y, x_in.dtype, ROUND_PRODUCT) * activated
    y_ptrs = y_ptr + row[:, None] * (groups * W) + col[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_rms_norm_bwd_kernel(
    dy_ptr,  # [R, H], rows dy_stride apart
    x_ptr, gate_ptr, weight_ptr, rstd_ptr,  # as in forward
    dx_ptr, dgate_ptr,  # [R, H] contiguous
    dweight_ptr,  # [programs, H] fp32
    dy_stride, x_stride, gate_stride, R, W,
    GATE_FIRST: tl.constexpr, CAST_FIRST: tl.constexpr, SIGMOID: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    program, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK_W)
    col = group * W + lane
    weight = tl.load(weight_ptr + col, mask=lane < W, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)

    step = tl.num_programs(0) * BLOCK_R
    for first_row in tl.range(program * BLOCK_R, R, step):
        row = (first_row + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (row < R)[:, None] & (lane < W)[None, :]
        x_in = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row * groups + group, mask=row < R, other=0.0)[:, None]

        x, dy = x_in.to(tl.float32), dy.to(tl.float32)
        activated, slope = _activation(gate.to(tl.float32), SIGMOID)
        xhat = (x * activated if GATE_FIRST else x) * rstd
        rounded = _round(xhat, x_in.dtype, CAST_FIRST)
        n = dy if GATE_FIRST else dy * activated
        dweight += n * rounded
        n *= weight
        du = rstd * (n - xhat * (tl.sum(n * xhat, 1) / W)[:, None])
        if GATE_FIRST:
            dx, d_activated = du * activated, du * x
        else:
            dx, d_activated = du, dy * _round(weight * rounded, x_in.dtype, ROUND_PRODUCT)
        out = row[:, None] * (groups * W) + col[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + out, (d_activated * slope).to(dgate_ptr.dtype.element_ty), mask=mask)

    dweight_ptrs = dweight_ptr + program.to(tl.int64) * (groups * W) + col
    tl.store(dweight_ptrs, tl.sum(dweight, 0), mask=lane < W)


def _y_dtype(x, weight, gate_first, cast_first):
    return torch.promote_types(x.dtype, weight.dtype) if gate_first and cast_first else x.dtype


def _flags(x, weight, gate_first, cast_first, sigmoid):
    return {
        "GATE_FIRST": gate_first, "CAST_FIRST": cast_first, "SIGMOID": sigmoid,
        "ROUND_PRODUCT": cast_first and not gate_first and weight.dtype == x.dtype,
    }  # fmt: skip


def _launch_fwd(x, gate, weight, eps, width, gate_first, cast_first, sigmoid):
    y, rstd = _fake_fwd(x, gate, weight, eps, width, gate_first, cast_first, sigmoid)
    if x.numel() == 0:
        return y, rstd
    x_RH, gate_RH = as_rows(x), as_rows(gate)
    R, H = x_RH.shape
    BLOCK_R, BLOCK_W, warps = tile(width, FWD_TILES)
    launch(
        _gated_rms_norm_fwd_kernel, (cdiv(R, BLOCK_R), H // width),
        x_RH, gate_RH, weight.contiguous(), y, rstd, x_RH.stride(0), gate_RH.stride(0), R, width,
        eps, **_flags(x, weight, gate_first, cast_first, sigmoid),
        BLOCK_R=BLOCK_R, BLOCK_W=BLOCK_W, num_warps=warps,
    )  # fmt: skip
    return y, rstd


def _fake_fwd(x, gate, weight, eps, width, gate_first, cast_first, sigmoid):
    y = x.new_empty(x.shape, dtype=_y_dtype(x, weight, gate_first, cast_first))
    groups = (*x.shape[:-1], x.shape[-1] // width)
    return y, x.new_empty(groups, dtype=torch.float32)


def _launch_bwd(dy, x, gate, weight, rstd, width, gate_first, cast_first, sigmoid):
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    dy_RH, x_RH, gate_RH = as_rows(dy), as_rows(x), as_rows(gate)
    R, H = x_RH.shape
    BLOCK_R, BLOCK_W, warps, programs_per_sm = tile(width, _BWD_TILES)
    resident = max(1, programs_per_sm * num_sms(x.device) * width // H)
    programs = min(cdiv(R, BLOCK_R), resident)
    partials = torch.empty(programs, H, dtype=torch.float32, device=x.device)
    if programs:
        launch(
            _gated_rms_norm_bwd_kernel, (programs, H // width),
            dy_RH, x_RH, gate_RH, weight.contiguous(), rstd, dx, dgate, partials,
            dy_RH.stride(0), x_RH.stride(0), gate_RH.stride(0), R, width,
            **_flags(x, weight, gate_first, cast_first, sigmoid),
            BLOCK_R=BLOCK_R, BLOCK_W=BLOCK_W, num_warps=warps,
        )  # fmt: skip
    return dx, dgate, partials.sum(0).to(weight.dtype)


def _fake_bwd(dy, x, gate, weight, *_):
    return tuple(t.new_empty(t.shape) for t in (x, gate, weight))


_OPTIONS = "int width, bool gate_first, bool cast_first, bool sigmoid"
_gated_rms_norm_fwd = register_op(
    f"gated_rms_norm_fwd(Tensor x, Tensor gate, Tensor weight, float eps, {_OPTIONS})"
    " -> (Tensor y, Tensor rstd)",
    _launch_fwd,
    _fake_fwd,
)
_gated_rms_norm_bwd = register_op(
    f"gated_rms_norm_bwd(Tensor dy, Tensor x, Tensor gate, Tensor weight, Tensor rstd, {_OPTIONS})"
    " -> (Tensor dx, Tensor dgate, Tensor dweight)",
    _launch_bwd,
    _fake_bwd,
)


def _reference_of(ctx):
    width, gate_first, cast_first, sigmoid = ctx.options
    function = functools.partial(
        gated_rms_norm_reference, eps=ctx.eps, group_size=width, gate_first=gate_first,
        cast_first=cast_first, activation="sigmoid" if sigmoid else "silu",
    )  # fmt: skip
    return function, ctx.saved_tensors[:3]


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, *options):
        y, rstd = _gated_rms_norm_fwd(x, gate, weight, eps, *options)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.eps, ctx.options = eps, options
        return y

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dy):
        grads = _gated_rms_norm_bwd(dy, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    gate_first: bool = False,
    cast_first: bool = True,
    activation: str = "silu",
) -> torch.Tensor:
    """Return the RMSNorm over groups of columns, with a gate before or after the norm.

    norm first (Qwen3-Next, Kimi): y = (weight * xhat * act(gate)).to(x.dtype).
    gate first (Mamba-2): y = weight * norm(x * act(gate)).

    Args:
        x, gate: [..., H], fp32, bf16 or fp16 each, any strides.
        weight: [H], of any of these dtypes.
        eps: added to the mean square.
        group_size: columns that are normalized together, a divisor of H; None is all of them.
        gate_first: apply the gate before the norm.
        cast_first: round xhat to x.dtype before scaling it; with `gate_first`, y then has the
            dtype that x and weight promote to.
        activation: "silu" or "sigmoid".

    Returns:
        y [..., H], contiguous on the kernel path. fp64 and H > 65536 run on the torch
        reference. With `create_graph=True` the backward pass runs in torch.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, `group_size` does not divide H, or the
            activation is unknown.

    Papers: arXiv:2405.21060, arXiv:2412.06464.
    """
    check_input("gated_rms_norm", x, weight=weight)
    if gate.shape != x.shape or gate.device != x.device or not gate.is_floating_point():
        raise ValueError(
            f"gated_rms_norm: gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}; needs"
            f" floating point {tuple(x.shape)} on {x.device}, like x"
        )
    width = x.shape[-1] if group_size is None else group_size
    if width < 1 or x.shape[-1] % width:
        raise ValueError(f"gated_rms_norm: group_size {width} does not divide {x.shape[-1]}")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f'gated_rms_norm: activation is "silu" or "sigmoid", got {activation!r}')
    if has_kernel(x, gate, weight):
        options = width, gate_first, cast_first, activation == "sigmoid"
        return _GatedRMSNorm.apply(x, gate, weight, float(eps), *options)
    return gated_rms_norm_reference(
        x, gate, weight, eps=eps, group_size=width, gate_first=gate_first, cast_first=cast_first,
        activation=activation,
    )  # fmt: skip
