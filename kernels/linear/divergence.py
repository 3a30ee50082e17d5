"""Distillation from hidden states: the divergence of two linear heads that never holds all logits.

    student logits = sum_t hidden_t @ weight_t^T + bias        teacher logits likewise
    (divergence, student entropy) = what `jensen_shannon.py` defines

for N tokens, one vocabulary V, and hidden sizes of the two models that may differ. A sum has
one term for a plain head; a head with a low-rank adapter has a second one (hidden_2 = s * A x
[N, r], weight_2 = B [V, r]). The gradient reaches the student; the teacher is a constant.

Cost, in GEMMs of 2 N H V FLOP with N the number of tokens that the mask keeps (the others are
dropped before the first GEMM, except among the first `FIRST_ROWS` tokens, see `supervised.py`).
The GEMM `+ 1` has the teacher's H, all others the student's:

    reduction           head trainable      head frozen         without gradient
    "sum", "mean"       3 + 1               2 + 1               1 + 1
    "none"              4 + 2               2 + 1               1 + 1

With "sum" and "mean" the gradient that backward receives is one number: both gradients are finished
in forward, and backward scales them. With "none" there is one for each token. d hidden is finished
in forward still, and its rows are scaled; d weight mixes the tokens, so backward computes the
logits once more.

Memory. A workspace of logits for each model; both share the budget of `workspace.py`. The student's
logits become their gradient in place. d weight is summed over workspaces in fp32, over no more than
two in its own dtype. Logits and their gradient are in the dtype of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..autograd import depends_on, first_derivative_only
from ..logits.divergence import token_divergence
from ..logits.jensen_shannon import (
    DEFAULT,
    DivergenceOptions,
    check_vocabularies,
    divergence_reference,
)
from ..logits.reduction import check_reduction, masked_scale, scale_sum
from ..logits.transform import accumulate_dtype
from ..runtime import on_device
from .head import LinearHead, Plan
from .supervised import Tokens
from .sweep import Sweep, scale_gradients
from .workspace import workspace_rows

# --- torch reference -------------------------------------------------------------------------


def linear_divergence_reference(
    hidden: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    teacher_hidden: Sequence[torch.Tensor],
    teacher_weight: Sequence[torch.Tensor],
    bias_V: torch.Tensor | None = None,
    teacher_bias_V: torch.Tensor | None = None,
    options: DivergenceOptions = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence [N], student entropy [N]), from all logits at once."""
    student = LinearHead(hidden, weight, bias_V).logits()
    teacher = LinearHead(teacher_hidden, teacher_weight, teacher_bias_V).logits()
    return divergence_reference(student, teacher, options)


# --- the chunk loop --------------------------------------------------------------------------


class _Pair:
    """The sweeps of student and teacher in one call. The tokens' `labels` are the mask [N]."""

    def __init__(self, heads, tokens: Tokens, plan: Plan, options: DivergenceOptions):
        self.tokens, self.plan, self.options = tokens, plan, options
        self.student, self.teacher = (Sweep(head, tokens, plan) for head in heads)

    def _step(self, want_grad: bool, results_N: tuple[torch.Tensor, torch.Tensor] | None = None):
        """Return the step that compares both logits; it may replace the student's with dlogits.

        It writes the divergence and the entropy of the rows to `results_N`.
        """

        def step(logits: torch.Tensor, start: int, stop: int) -> None:
            rows = self.student.logits.shape[0]
            if self.teacher.logits.shape[0] < rows:
                self.teacher.logits = self.teacher.new_logits(rows)
            teacher_logits = self.teacher.logits[: stop - start]
            self.teacher.fill_(teacher_logits, start, stop)
            mask = self.tokens.pick(self.tokens.labels, start, stop)
            grad = logits if want_grad else None
            results = token_divergence(logits, teacher_logits, mask, self.options, grad)
            for out, values in zip(results_N or (), results, strict=False):
                self.tokens.put(out, values, start, stop)

        return step

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (divergence, entropy), and leave the gradients in `student`.

        The gradients of the head are computed only if the plan is uniform.
        """
        sweep, plan, like = self.student, self.plan, self.student.logits
        n = self.tokens.labels.shape[0]
        divergence_N, entropy_N = like.new_zeros((2, n), dtype=accumulate_dtype(like)).unbind()
        sweep.choose_sum_dtypes(at_most_two=n <= 2 * plan.rows)
        finish_head = plan.uniform and plan.want_head
        step = self._step(finish_head or any(plan.want_hidden), (divergence_N, entropy_N))
        for begin, stop in sweep.workspaces(step, plan.workspace(n)):
            sweep.add_hidden(begin, stop)
            if finish_head:
                sweep.add_head(begin, stop)
        return divergence_N, entropy_N

    def head_gradient(self, g_N: torch.Tensor):
        """Return (d weight, d bias) of sum_n g_n * divergence_n, from recomputed logits."""
        sweep, n = self.student, self.tokens.labels.shape[0]
        sweep.choose_sum_dtypes(at_most_two=n <= 2 * self.plan.rows)
        for begin, stop in sweep.workspaces(self._step(want_grad=True), self.plan.workspace(n)):
            sweep.add_head(begin, stop, g_N)
        return sweep.gradients()[1:]


# --- autograd --------------------------------------------------------------------------------


class _LinearDivergence(torch.autograd.Function):
    """Return (divergence, entropy [N]): the divergence is summed if the plan is uniform, else [N].

    The operands are those of both heads, `counts[0]` of the student and `counts[1]` of the teacher.
    """

    @staticmethod
    def forward(ctx, plan, options, counts, mask_N, *operands):
        heads = _heads(operands, counts)
        ctx.plan, ctx.options, ctx.counts, ctx.dtypes = plan, options, counts, heads[0].dtypes
        with on_device(mask_N):
            labels_N = mask_N.to(torch.int64) - 1  # 0, and -1 for a token that the mask excludes
            tokens = Tokens.of(labels_N, 1, -1, plan.first)
            tokens.labels = mask_N
            pair = _Pair(heads, tokens, plan, options)
            divergence, entropy = pair.forward()
        ctx.host = tokens.host
        ctx.recompute = plan.want_head and not plan.uniform
        to_recompute = (tokens.order, *operands) if ctx.recompute else ()
        depends_on(ctx, *operands)
        ctx.save_for_backward(mask_N, *pair.student.flat_gradients(), *to_recompute)
        ctx.mark_non_differentiable(entropy)
        return divergence.sum() if plan.uniform else divergence, entropy

    @staticmethod
    @first_derivative_only
    def backward(ctx, g, _):
        mask_N, *rest = ctx.saved_tensors
        count = ctx.counts[0]
        scale_N = masked_scale(g, mask_N)  # an excluded token gets exactly 0, whatever g is
        with on_device(g):
            dhidden, dweight, dbias = scale_gradients(rest[:count], g, mask_N, ctx.dtypes, scale_N)
            if ctx.recompute:
                order, *operands = rest[count:]
                tokens = Tokens(mask_N, order, ctx.host, 1)
                pair = _Pair(_heads(operands, ctx.counts), tokens, ctx.plan, ctx.options)
                dweight, dbias = pair.head_gradient(scale_N)
        nothing = (None,) * ctx.counts[1]
        return *[None] * 4, *ctx.plan.gradients(dhidden, dweight, dbias), *nothing


def _heads(operands, counts: tuple[int, int]) -> list[LinearHead]:
    """Return the heads of student and teacher from their flat operands."""
    student, _ = counts
    return [LinearHead.unflatten(operands[:student]), LinearHead.unflatten(operands[student:])]


# --- public ----------------------------------------------------------------------------------


@torch.compiler.disable(reason="the number of tokens kept decides the shapes of the GEMMs")
def linear_divergence(
    hidden: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor | Sequence[torch.Tensor],
    teacher_hidden: torch.Tensor | Sequence[torch.Tensor],
    teacher_weight: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    *,
    options: DivergenceOptions = DEFAULT,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | int | None = None,
    max_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of `hidden @ weight.T + bias` from the teacher's logits.

    The module's docstring states the formula's source, and the cost in GEMMs and memory.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such. May have another dtype (fp32 parameters, bf16
            hidden states); its gradient has its own dtype.
        teacher_hidden: [..., H_teacher], or a sequence of such, with the leading shape of `hidden`;
            must not require a gradient.
        teacher_weight: [V, H_teacher], or a sequence of such. Treated as a constant, even if it is
            a parameter that requires a gradient.
        mask: [...], bool; tokens where it is False have no divergence, and cost nothing.
        bias, teacher_bias: [V].
        options: the kind of divergence, temperature, scales and softcaps.
        reduction: "none" (the shape of `mask`), "sum" or "mean" over the tokens that `mask` keeps.
        num_items_in_batch: if given, the summed divergence is divided by it (HF gradient
            accumulation).
        max_rows: rows of logits held at once, of each model; default by `workspace_rows`.

    Returns (divergence, student entropy) in fp32: the reduced divergence, and the detached entropy
    [...] of each token; both are 0 where `mask` is False. Gradients reach hidden, weight and bias;
    nothing is computed or allocated for those that do not require them. If no token is kept the
    divergence and all gradients are 0. torch.compile breaks the graph here.

    Raises ValueError if shapes, dtypes, devices or vocabularies do not fit, if `teacher_hidden`
    requires a gradient, and for invalid options.
    """
    student = _checked("student", hidden, weight, bias)
    teacher = _checked("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_pair(student, teacher, mask)
    check_reduction(reduction, num_items_in_batch)
    mask_N = mask.reshape(-1).contiguous()
    if max_rows is None:
        max_rows = _shared_rows(mask_N.shape[0], student, teacher)
    plan = student.plan(mask_N.shape[0], reduction != "none", max_rows)
    operands = student.flatten(), teacher.flatten()
    divergence, entropy = _LinearDivergence.apply(
        plan, options, tuple(map(len, operands)), mask_N, *operands[0], *operands[1]
    )
    entropy = entropy.reshape(mask.shape)
    if reduction == "none":
        return divergence.reshape(mask.shape), entropy
    count = mask_N.sum().clamp_min(1)
    return scale_sum(divergence, reduction, count, num_items_in_batch), entropy


def _shared_rows(tokens: int, student: LinearHead, teacher: LinearHead) -> int:
    """Return the rows of each of the two workspaces, which share the budget of one."""
    like = student.hidden[0]
    rows = workspace_rows(tokens, student.rows, student.trainable_width, like)
    both = like.element_size() + teacher.hidden[0].element_size()
    return max(1, rows * like.element_size() // both)


def _checked(side: str, hidden, weight, bias) -> LinearHead:
    try:
        return LinearHead.checked(hidden, weight, bias)
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from error


def _check_pair(student: LinearHead, teacher: LinearHead, mask: torch.Tensor) -> None:
    check_vocabularies(student.vocab, teacher.vocab)
    if teacher.tokens != student.tokens or mask.shape != student.tokens:
        raise ValueError(
            "student, teacher and mask must have the same tokens: hidden "
            f"{tuple(student.hidden[0].shape)}, teacher_hidden {tuple(teacher.hidden[0].shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool, got {mask.dtype}: pass completion_mask.bool() or labels != -100"
        )
    devices = student.device, teacher.device, mask.device
    if len(set(devices)) > 1:
        raise ValueError(
            f"student, teacher and mask must be on one device: {', '.join(map(str, devices))}"
        )
    if torch.is_grad_enabled() and any(h.requires_grad for h in teacher.hidden):
        raise ValueError(
            "teacher_hidden requires a gradient, and none is computed: run the teacher under "
            "torch.no_grad(), or detach its hidden states"
        )
