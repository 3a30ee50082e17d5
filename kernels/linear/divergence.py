"""Distillation from hidden states: the divergence of two linear heads that never holds all logits.

    student logits = sum_t hidden_t @ weight_t^T + bias        teacher logits likewise
    (divergence, student entropy) = what `jensen_shannon.py` defines

for N tokens, one vocabulary V, and hidden sizes of the two models that may differ. A sum has
one term for a plain head; a head with a low-rank adapter has a second one (hidden_2 = s * A x
[N, r], weight_2 = B [V, r]). The gradient reaches the student; the teacher is a constant.

Cost, in GEMMs of 2 N H V FLOP with N the number of tokens that the mask keeps (tokens
that it leaves out are dropped before the first GEMM, all but the first `FIRST_ROWS` tokens'
worth, see `supervised.py`). One GEMM, `+ 1`, has the teacher's H, the others the student's:

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

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ..autograd import first_derivative_only
from ..logits.divergence import token_divergence
from ..logits.jensen_shannon import (
    DEFAULT,
    DivergenceOptions,
    check_vocabularies,
    divergence_reference,
)
from ..logits.loss import accumulate_dtype
from ..logits.reduction import REDUCTIONS, masked_scale, scale_rows, scale_sum
from ..runtime import on_device
from .head import Head, HeadGradient, Plan
from .operands import checked_operands, make_head, make_plan
from .supervised import HostStats, partition
from .workspace import grown, rounded, spans, sum_dtype, workspace_rows

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
    """(divergence [N], student entropy [N]), from all logits at once."""
    student = _all_logits(hidden, weight, bias_V)
    return divergence_reference(
        student, _all_logits(teacher_hidden, teacher_weight, teacher_bias_V), options
    )


def _all_logits(hidden, weight, bias):
    logits_NV = sum(h @ w.to(h.dtype).t() for h, w in zip(hidden, weight, strict=True))
    return logits_NV if bias is None else logits_NV + bias.to(logits_NV.dtype)


# --- the chunk loop --------------------------------------------------------------------------


@dataclasses.dataclass
class _Pair:
    """Both heads of one call. Their `labels` are the mask [N]; they share order and count."""

    student: Head
    teacher: Head
    options: DivergenceOptions

    def sweep(
        self, plan: Plan, want_grad: bool, divergence_N: torch.Tensor, entropy_N: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Fill `divergence_N` and `entropy_N`, and yield one workspace after the other.

        A workspace is (its first row, d divergence / d student logits of its rows), the latter
        overwritten by the next; the last one has no rows if no token is kept.
        """
        n = self.student.labels.shape[0]
        rows = plan.workspace(n)
        student, teacher = (
            head.hidden[0].new_empty((0, head.vocab)) for head in (self.student, self.teacher)
        )
        begin = stop = 0
        for start, stop in spans(n, rows, plan.first, self.student.supervised):
            if start - begin == rows:
                yield begin, student[:rows]
                begin = start
            if stop - begin > student.shape[0]:
                size = stop if start == 0 else rounded(self.student.supervised(), min(n, rows))
                student = grown(student, size)
                teacher = teacher.new_empty(student.shape)
            part, against = (x[start - begin : stop - begin] for x in (student, teacher))
            self.student.logits_(part, start, stop)
            self.teacher.logits_(against, start, stop)
            mask = self.student.rows(self.student.labels, start, stop)
            values, entropies = token_divergence(
                part, against, mask, self.options, part if want_grad else None
            )
            self.student.store(divergence_N, values, start, stop)
            self.student.store(entropy_N, entropies, start, stop)
        yield begin, student[: stop - begin]

    def forward(self, plan: Plan, dtypes: Sequence[torch.dtype]):
        """(divergence, entropy, d hidden, d weight, d bias), the last two only if uniform."""
        student = self.student
        n, like = student.labels.shape[0], student.hidden[0]
        divergence_N, entropy_N = like.new_zeros((2, n), dtype=accumulate_dtype(like)).unbind()
        dhidden = [
            torch.zeros(h.shape if want else 0, dtype=h.dtype, device=h.device)
            for h, want in zip(student.hidden, plan.want_hidden, strict=True)
        ]
        finished = plan if plan.uniform else _without_head(plan)
        gradient = HeadGradient(
            student, finished, [sum_dtype(d, n <= 2 * plan.rows) for d in dtypes]
        )
        for begin, dlogits in self.sweep(plan, finished.want_grad, divergence_N, entropy_N):
            for out, weight, want in zip(dhidden, student.weight, plan.want_hidden, strict=True):
                if want:
                    student.hidden_grad_(out, dlogits, weight, begin, begin + dlogits.shape[0])
            if finished.want_head:
                gradient.add(dlogits, begin, None)
        return divergence_N, entropy_N, dhidden, gradient.weight, gradient.bias

    def head_gradient(self, g_N: torch.Tensor, plan: Plan, dtypes: Sequence[torch.dtype]):
        """(d weight, d bias) of sum_n g_n * divergence_n, from logits computed once more."""
        n, like = self.student.labels.shape[0], self.student.hidden[0]
        unused = like.new_empty((2, n), dtype=accumulate_dtype(like))
        gradient = HeadGradient(
            self.student, plan, [sum_dtype(d, n <= 2 * plan.rows) for d in dtypes]
        )
        for begin, dlogits in self.sweep(plan, True, *unused):
            gradient.add(dlogits, begin, g_N)
        return [w.to(d) for w, d in zip(gradient.weight, dtypes, strict=True)], gradient.bias


def _without_head(plan: Plan) -> Plan:
    nothing = (False,) * len(plan.want_weight)
    return dataclasses.replace(plan, want_weight=nothing, want_bias=False)


# --- autograd --------------------------------------------------------------------------------


def _pair(options, terms, order, host, mask_N, bias, teacher_bias, *operands) -> _Pair:
    """`operands`: hidden and weight of the student, `terms` of each, then those of the teacher."""
    student, teacher = operands[: 2 * terms], operands[2 * terms :]
    heads = [
        make_head(own[: len(own) // 2], own[len(own) // 2 :], b, mask_N, o, order, host)
        for own, b, o in (
            (student, bias, options.student),
            (teacher, teacher_bias, options.teacher),
        )
    ]
    return _Pair(*heads, options)


class _LinearDivergence(torch.autograd.Function):
    """(divergence, entropy [N]): the divergence is the sum if the plan is uniform, else [N]."""

    @staticmethod
    def forward(ctx, plan, options, terms, mask_N, *operands):
        ctx.plan, ctx.options, ctx.terms = plan, options, terms
        ctx.dtypes = [w.dtype for w in operands[2 + terms : 2 + 2 * terms]]
        with on_device(mask_N):
            labels_N = mask_N.to(torch.int64) - 1  # 0, and -1 for a token left out
            order, stats = partition(labels_N, 1, -1, want_order=mask_N.shape[0] > plan.first)
            ctx.host = HostStats(stats)
            pair = _pair(options, terms, order, ctx.host, mask_N, *operands)
            divergence, entropy, dhidden, dweight, dbias = pair.forward(plan, ctx.dtypes)
        ctx.bias_dtype = None if operands[0] is None else operands[0].dtype
        ctx.again = plan.want_head and not plan.uniform
        again = (order, *operands) if ctx.again else ()
        ctx.save_for_backward(dbias, mask_N, *dhidden, *dweight, *again)
        ctx.mark_non_differentiable(entropy)
        return divergence.sum() if plan.uniform else divergence, entropy

    @staticmethod
    @first_derivative_only
    def backward(ctx, g, _):
        plan, terms = ctx.plan, ctx.terms
        dbias, mask_N, *rest = ctx.saved_tensors
        dhidden, dweight, again = rest[:terms], rest[terms : 2 * terms], rest[2 * terms :]
        scale_N = masked_scale(g, mask_N)  # a token left out gets exactly 0, whatever g is
        with on_device(g):
            if ctx.again:
                order, *operands = again
                pair = _pair(ctx.options, terms, order, ctx.host, mask_N, *operands)
                dweight, dbias = pair.head_gradient(scale_N, plan, ctx.dtypes)
            elif plan.want_head:
                total = masked_scale(g, mask_N.any())
                dweight = [
                    torch.mul(d, total, out=d.new_empty(d.shape, dtype=dtype))
                    for d, dtype in zip(dweight, ctx.dtypes, strict=True)
                ]
                dbias = dbias * total
            grad_hidden = [
                scale_rows(d, scale_N) if want else None
                for d, want in zip(dhidden, plan.want_hidden, strict=True)
            ]
        grad_weight = [
            d if want else None for d, want in zip(dweight, plan.want_weight, strict=True)
        ]
        grad_bias = dbias.to(ctx.bias_dtype) if plan.want_bias else None
        given = (None, None, None, None, grad_bias, None, *grad_hidden, *grad_weight)
        return *given, *[None] * (len(ctx.needs_input_grad) - len(given))


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
    """Divergence of `hidden @ weight.T + bias` from the teacher's; the module says at what cost.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such. May be of another dtype (fp32 parameters, bf16
            hidden states); its gradient has its own dtype.
        teacher_hidden: [..., H_teacher], or a sequence of such, with the leading shape of `hidden`;
            computed without gradient.
        teacher_weight: [V, H_teacher], or a sequence of such. Always a constant, even if it is a
            parameter that requires a gradient.
        mask: [...], bool; False for tokens without divergence (and without cost).
        bias, teacher_bias: [V].
        options: which divergence, temperature, scales and softcaps.
        reduction: "none" (the shape of `mask`), "sum" or "mean" over the tokens that `mask` keeps.
        num_items_in_batch: if given, the summed divergence is divided by it (HF gradient
            accumulation).
        max_rows: rows of logits held at once, of each model; default by `workspace_rows`.

    Returns (divergence, student entropy) in fp32: the divergence reduced, the entropy [...] of each
    token, detached; both are 0 where `mask` is False. Gradients reach hidden, weight and bias;
    nothing is computed or allocated for those that do not require them. If no token is kept the
    divergence and all gradients are 0. torch.compile breaks the graph here.

    Raises ValueError for shapes, dtypes, devices or vocabularies that do not fit, for a
    `teacher_hidden` that requires a gradient, and for options without meaning.
    """
    hidden, weight, bias = _checked("student", hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = _checked(
        "teacher", teacher_hidden, teacher_weight, teacher_bias
    )
    _check_pair(hidden[0], weight[0], teacher_hidden, teacher_weight[0], mask)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError('num_items_in_batch divides a sum: reduction must be "sum" or "mean"')
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be positive or None, got {max_rows}")
    mask_N = mask.reshape(-1).contiguous()
    hidden, teacher_hidden = (
        [h.reshape(-1, h.shape[-1]) for h in side] for side in (hidden, teacher_hidden)
    )
    rows = max_rows or _shared_rows(hidden[0], weight, teacher_hidden[0])
    plan = make_plan(hidden, weight, bias, mask_N, reduction != "none", rows)
    divergence, entropy = _LinearDivergence.apply(
        plan, options, len(hidden), mask_N, bias, teacher_bias,
        *hidden, *weight, *teacher_hidden, *teacher_weight,
    )  # fmt: skip
    entropy = entropy.reshape(mask.shape)
    if reduction == "none":
        return divergence.reshape(mask.shape), entropy
    count = mask_N.sum().clamp_min(1)
    return scale_sum(divergence, reduction, count, num_items_in_batch), entropy


def _shared_rows(hidden: torch.Tensor, weight: list[torch.Tensor], teacher: torch.Tensor) -> int:
    """Rows of each of the two workspaces within the budget of one."""
    trained = sum(w.shape[1] for w in weight if w.requires_grad and torch.is_grad_enabled())
    rows = workspace_rows(hidden.shape[0], weight[0].shape[0], trained, hidden)
    both = hidden.element_size() + teacher.element_size()
    return max(1, rows * hidden.element_size() // both)


def _checked(side: str, hidden, weight, bias):
    try:
        hidden, weight, bias = checked_operands(hidden, weight, bias)
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from error
    if bias is not None and (bias.device != weight[0].device or not bias.is_floating_point()):
        raise ValueError(
            f"{side}: bias must be floating point on {weight[0].device}, got {bias.dtype} on "
            f"{bias.device}"
        )
    return hidden, weight, bias


def _check_pair(hidden, weight, teacher_hidden, teacher_weight, mask) -> None:
    check_vocabularies(weight.shape[0], teacher_weight.shape[0])
    tokens = hidden.shape[:-1]
    if teacher_hidden[0].shape[:-1] != tokens or mask.shape != tokens:
        raise ValueError(
            f"student, teacher and mask must have the same tokens: hidden {tuple(hidden.shape)}, "
            f"teacher_hidden {tuple(teacher_hidden[0].shape)}, mask {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool, got {mask.dtype}: pass completion_mask.bool() or labels != -100"
        )
    devices = {hidden.device, teacher_hidden[0].device, mask.device}
    if len(devices) > 1:
        raise ValueError(
            "student, teacher and mask must be on one device: "
            f"{hidden.device}, {teacher_hidden[0].device}, {mask.device}"
        )
    if torch.is_grad_enabled() and any(h.requires_grad for h in teacher_hidden):
        raise ValueError(
            "teacher_hidden requires a gradient, and none is computed: run the teacher under "
            "torch.no_grad(), or detach its hidden states"
        )
