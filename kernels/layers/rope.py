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

import torch

from ..runtime import use_triton
from ..second_derivative import twice_differentiable
from .rope_kernel import rope_op, rotated

MIN_ELEMENTS = 1 << 22  # of q; below this, a dozen torch kernels are as fast (H200, with host)


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
    R = rotated(cos, narrow_table)
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
        return rope_op(q, k, cos, sin, *dtypes, *ctx.options, False)

    @staticmethod
    @twice_differentiable(_reference_of)
    def backward(ctx, dq, dk):
        grads = rope_op(dq, dk, *ctx.saved_tensors, *ctx.dtypes, *ctx.options, True)
        return *grads, *[None] * 9


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
        cos, sin: [B or 1, S, R] with R even and R <= D, already gathered by position. Narrow ones
            may be the real and the imaginary part of one complex tensor.
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
