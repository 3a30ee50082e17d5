"""Divergence of a student from a teacher, token by token, from the logits of both (distillation).

The formula and its options are in `jensen_shannon.py`. One kernel reads the two rows of logits of a
token three times: for both log-sum-exps; for the divergence and the student's entropy; and, where
wanted, for the gradient, which may overwrite the student's logits.

Shapes: N tokens, V vocabulary. Logits in fp32, bf16 or fp16, the two sides may differ;
everything inside is fp32 (fp64 for fp64 student logits, torch path only). The gradient is rounded
once, to the dtype of the student's logits.
"""

from __future__ import annotations

import dataclasses

import torch

from ..autograd import depends_on, first_derivative_only
from ..runtime import block_sizes, register_op, runs_in_triton, tl, triton
from .jensen_shannon import (
    DEFAULT,
    DivergenceOptions,
    check_vocabularies,
    divergence_reference,
    entropy,
    log_ratios,
)
from .reduction import scale_rows
from .transform import accumulate_dtype, chain, transform

# --- torch path ------------------------------------------------------------------------------


def _token_divergence_torch(student_NV, teacher_NV, mask_N, options, grad_NV):
    """Compute `token_divergence` in plain torch."""
    dtype = accumulate_dtype(student_NV)
    y_s = options.student(student_NV)
    log_s = y_s.log_softmax(-1)
    log_t = options.teacher(teacher_NV.to(dtype)).log_softmax(-1)
    ratio_s, ratio_t = log_ratios(log_s, log_t, options)
    p_s, p_t = log_s.exp(), log_t.exp()
    share_s, share_t = options.shares
    kl_s = (p_s * ratio_s).sum(-1)
    divergence = share_s * kl_s + share_t * (p_t * ratio_t).sum(-1)
    entropy_N = entropy(log_s)

    if grad_NV is not None:
        if options.kind == "forward":
            grad = p_s - p_t
        else:
            grad = share_s * p_s * (ratio_s - kl_s.unsqueeze(-1))
        options.student.chain_(grad, y_s)
        grad_NV.copy_(grad.masked_fill_(~mask_N.unsqueeze(-1), 0.0))
    return divergence.where(mask_N, 0.0), entropy_N.where(mask_N, 0.0)


# --- Triton kernel ---------------------------------------------------------------------------


@triton.jit
def _load(logits_ptr, cols, mask, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return y for a block of columns, -inf beyond the last column."""
    z = tl.load(logits_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.where(mask, transform(z, scale, softcap, HAS_SOFTCAP), -float("inf"))


@triton.jit
def _add_exp(top, sums, y):
    """Add a block to the online log-sum-exp; return (maximum so far, sums of exp(y - maximum))."""
    new_top = tl.maximum(top, tl.max(y, 0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, sums * tl.exp(top - shift) + tl.exp(y - shift)


@triton.jit
def _compare(log_s, log_t, log_share_s, log_share_t, KIND: tl.constexpr):
    """Return (p_s, p_t, log(p_s / m), log(p_t / m)), the logarithms 0 where their p is 0."""
    if KIND == "forward":
        log_m = log_s
    elif KIND == "reverse":
        log_m = log_t
    else:
        a = log_s + log_share_s
        b = log_t + log_share_t
        top = tl.maximum(a, b)
        log_m = top + tl.log(tl.exp(a - top) + tl.exp(b - top))  # NaN where neither is possible
    p_s = tl.exp(log_s)
    p_t = tl.exp(log_t)
    # Not `p > 0`, which would also turn the NaN of broken logits into a number.
    ratio_s = tl.where(p_s == 0.0, 0.0, log_s - log_m)
    ratio_t = tl.where(p_t == 0.0, 0.0, log_t - log_m)
    return p_s, p_t, ratio_s, ratio_t


@triton.jit
def _divergence_kernel(
    student_ptr, student_stride, teacher_ptr, teacher_stride, grad_ptr, grad_stride, mask_ptr,
    divergence_ptr, entropy_ptr, V, share_s, share_t, log_share_s, log_share_t,
    scale_s, softcap_s, scale_t, softcap_t,
    KIND: tl.constexpr, WRITE_GRAD: tl.constexpr, SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one token's divergence, entropy and gradient; grad_ptr may be student_ptr."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * grad_stride

    if tl.load(mask_ptr + row) == 0:
        tl.store(divergence_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        if WRITE_GRAD:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(grad_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
        return

    top_s = tl.full([], -float("inf"), tl.float32)
    top_t = tl.full([], -float("inf"), tl.float32)
    sums_s = tl.zeros([BLOCK], tl.float32)
    sums_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y_s = _load(student_ptr, cols, cols < V, scale_s, softcap_s, SOFTCAP_S)
        y_t = _load(teacher_ptr, cols, cols < V, scale_t, softcap_t, SOFTCAP_T)
        top_s, sums_s = _add_exp(top_s, sums_s, y_s)
        top_t, sums_t = _add_exp(top_t, sums_t, y_t)
    log_sum_s = tl.log(tl.sum(sums_s, 0))  # y - top - log_sum: rounds less than y - (top + log_sum)
    log_sum_t = tl.log(tl.sum(sums_t, 0))

    kl_s = tl.zeros([BLOCK], tl.float32)
    kl_t = tl.zeros([BLOCK], tl.float32)
    p_log_p = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y_s = _load(student_ptr, cols, cols < V, scale_s, softcap_s, SOFTCAP_S)
        y_t = _load(teacher_ptr, cols, cols < V, scale_t, softcap_t, SOFTCAP_T)
        log_s = y_s - top_s - log_sum_s
        log_t = y_t - top_t - log_sum_t
        p_s, p_t, ratio_s, ratio_t = _compare(log_s, log_t, log_share_s, log_share_t, KIND)
        kl_s += p_s * ratio_s
        kl_t += p_t * ratio_t
        p_log_p += tl.where(p_s == 0.0, 0.0, p_s * log_s)
    sum_kl_s = tl.sum(kl_s, 0)
    tl.store(divergence_ptr + row, share_s * sum_kl_s + share_t * tl.sum(kl_t, 0))
    tl.store(entropy_ptr + row, -tl.sum(p_log_p, 0))

    if WRITE_GRAD:
        tl.debug_barrier()  # so that no thread overwrites logits that another has yet to read
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y_s = _load(student_ptr, cols, cols < V, scale_s, softcap_s, SOFTCAP_S)
            y_t = _load(teacher_ptr, cols, cols < V, scale_t, softcap_t, SOFTCAP_T)
            p_s, p_t, ratio_s, ratio_t = _compare(
                y_s - top_s - log_sum_s, y_t - top_t - log_sum_t, log_share_s, log_share_t, KIND
            )
            grad = p_s - p_t
            if KIND != "forward":
                grad = share_s * p_s * (ratio_s - sum_kl_s)
            grad = chain(grad, y_s, scale_s, softcap_s, SOFTCAP_S)
            tl.store(grad_ptr + cols, grad, mask=cols < V)


# --- launchers -------------------------------------------------------------------------------

_SIZES = (4096, 8)  # columns and warps of a program


def token_divergence(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor,
    options: DivergenceOptions,
    grad_NV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence [N], student entropy [N]), 0 where `mask_N` (bool) is False.

    Writes d divergence_n / d student_n to `grad_NV` if given, which may be `student_NV` itself. All
    three may have any row stride, but columns are contiguous.
    """
    if not (runs_in_triton(student_NV) and runs_in_triton(teacher_NV)):
        return _token_divergence_torch(student_NV, teacher_NV, mask_N, options, grad_NV)
    n, vocab = student_NV.shape
    divergence_N = torch.empty(n, dtype=torch.float32, device=student_NV.device)
    entropy_N = torch.empty_like(divergence_N)
    scale_s, softcap_s, has_softcap_s = options.student.arguments
    scale_t, softcap_t, has_softcap_t = options.teacher.arguments
    grad = student_NV if grad_NV is None else grad_NV
    if n:
        _divergence_kernel[(n,)](
            student_NV, student_NV.stride(0), teacher_NV, teacher_NV.stride(0),
            grad, grad.stride(0), mask_N.view(torch.uint8), divergence_N, entropy_N, vocab,
            *options.shares, *options.log_shares,
            scale_s, softcap_s, scale_t, softcap_t,
            KIND=options.kind, WRITE_GRAD=grad_NV is not None,
            SOFTCAP_S=has_softcap_s, SOFTCAP_T=has_softcap_t, **block_sizes(vocab, _SIZES),
        )  # fmt: skip
    return divergence_N, entropy_N


def _launch(student, teacher, want_grad, *options):
    grad = torch.empty(student.shape if want_grad else 0, dtype=student.dtype,
                       device=student.device)  # fmt: skip
    mask = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    values = token_divergence(
        student, teacher, mask, DivergenceOptions(*options), grad if want_grad else None
    )
    return *values, grad


OPTIONS = (
    "float beta, float temperature, float scale, float? softcap, float teacher_scale,"
    " float? teacher_softcap"
)
"""`DivergenceOptions` in the schema of an op."""

_divergence = register_op(
    f"divergence(Tensor student, Tensor teacher, bool want_grad, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _launch,
    lambda student, teacher, want_grad, *_: (
        student.new_empty(student.shape[0], dtype=torch.float32),
        student.new_empty(student.shape[0], dtype=torch.float32),
        student.new_empty(student.shape if want_grad else 0),
    ),
)
_scale_rows = register_op(
    "divergence_bwd(Tensor grad, Tensor g) -> Tensor",
    scale_rows,
    lambda grad, g: torch.empty_like(grad),
)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, want_grad, *options):
        divergence, entropy, grad = _divergence(student, teacher, want_grad, *options)
        depends_on(ctx, student)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    @first_derivative_only
    def backward(ctx, g_N, _):
        (grad_NV,) = ctx.saved_tensors
        return _scale_rows(grad_NV, g_N), *[None] * (len(ctx.needs_input_grad) - 1)


# --- public ----------------------------------------------------------------------------------


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    options: DivergenceOptions = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence, student entropy) of each token; the formula is in `jensen_shannon.py`.

    Args:
        student_logits: [..., V], fp32, bf16, fp16 (fp64 on the torch path).
        teacher_logits: the same shape, any of these dtypes, must not require a gradient.
        options: the kind of divergence, temperature, scales and softcaps.

    Returns two tensors [...] in fp32. Only `student_logits` gets a gradient; the entropy is
    detached. The gradient is computed with the divergence and saved for backward, in the dtype of
    the student's logits.

    Raises ValueError if shapes, dtypes or devices do not fit, and if the teacher's logits require a
    gradient.
    """
    _check_logits(student_logits, teacher_logits)
    vocab, shape = student_logits.shape[-1], student_logits.shape[:-1]
    student, teacher = student_logits.reshape(-1, vocab), teacher_logits.reshape(-1, vocab)
    if runs_in_triton(student) and runs_in_triton(teacher):
        want_grad = student.requires_grad and torch.is_grad_enabled()
        student, teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (student, teacher))
        values = _Divergence.apply(student, teacher, want_grad, *dataclasses.astuple(options))
    else:
        values = divergence_reference(student, teacher, options)
    return values[0].reshape(shape), values[1].reshape(shape)


def _check_logits(student: torch.Tensor, teacher: torch.Tensor) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point() or logits.dim() == 0:
            raise ValueError(f"{name}_logits must be floating point [..., V], got {logits.dtype}")
    check_vocabularies(student.shape[-1], teacher.shape[-1])
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits are {tuple(student.shape)}, teacher_logits {tuple(teacher.shape)}; "
            "both need a row for each token"
        )
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device}, teacher's on {teacher.device}")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits require a gradient, and none is computed: run the teacher under "
            "torch.no_grad(), or detach its logits"
        )
