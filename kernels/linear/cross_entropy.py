"""Linear head and cross entropy in one operation that never holds all logits.

    logits = sum_t hidden_t @ weight_t^T + bias          loss = cross_entropy(logits, labels)

for N tokens, hidden size H, vocabulary V. The sum has one term for a plain head; a head with a
low-rank adapter has a second one (hidden_2 = s * A x [N, r], weight_2 = B [V, r]).

Cost. The floor for a trainable head is three GEMMs of 2 N H V FLOP (logits, d hidden,
d weight), with N the number of *supervised* tokens. Exactly these are paid: tokens whose label is
`ignore_index` are left out before the first GEMM (all but the first `FIRST_ROWS` tokens' worth,
see `supervised.py`), and logits are turned into their gradient in place.

    reduction           head trainable                                   head frozen
    "sum", "mean"       3 GEMMs                                       2
    "none"              3 if the logits fit the workspace, else 4        2

Memory. One workspace of logits (`workspace.py`). If all supervised tokens fit it, their gradient is
kept until backward, where d weight is a single GEMM, accumulated in fp32 by the hardware. Over
two workspaces d weight is summed in its own dtype, the second GEMM onto the rounded first; over
more in an fp32 buffer that is rounded once.

Row scaling. d loss_n / d logits is known up to the factor g_n that backward receives. It scales the
rows of d hidden and, for d weight, the rows of `hidden` (N x H): never the logits (N x V).

Formula of the loss, options and sources: `loss.py`. The chunk loop: `head.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..autograd import first_derivative_only
from ..logits.loss import LossOptions, accumulate_dtype, cross_entropy_reference
from ..logits.reduction import (
    REDUCTIONS,
    check_labels,
    checked_weights,
    masked_scale,
    mean_denominator,
    reduce_loss,
    scale_sum,
)
from ..runtime import on_device, register_op
from .head import LinearHead, Plan, split
from .supervised import HostStats, Tokens
from .sweep import Sweep, scaled
from .vocab_parallel import VocabShard, token_loss_
from .workspace import sum_dtype

# --- torch reference -------------------------------------------------------------------------


def linear_cross_entropy_reference(
    hidden: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    class_weight_V: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Loss per token [N], from all logits at once."""
    logits_NV = sum(h @ w.to(h.dtype).t() for h, w in zip(hidden, weight, strict=True))
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    return cross_entropy_reference(logits_NV, labels_N, class_weight_V, options)


# --- forward and backward ---------------------------------------------------------------------


class _Saved(NamedTuple):
    """What forward leaves for backward. A tensor that is not needed has no elements."""

    filled: int  # rows of `dlogits` that hold a gradient
    dlogits: torch.Tensor  # [rows, V], the one workspace
    dbias: torch.Tensor  # [V]
    dhidden: Sequence[torch.Tensor]  # [N, H_t] each, before g
    dweight: Sequence[torch.Tensor]  # [V, H_t] each, summed over workspaces, before g


@dataclasses.dataclass
class _Call:
    """The operands of one call."""

    head: LinearHead
    tokens: Tokens
    class_weight: torch.Tensor | None  # [V]
    row_weight: torch.Tensor | None  # [N]; multiplies each token's loss, in a uniform plan alone
    plan: Plan
    options: LossOptions

    def _losses_to(self, loss_N: torch.Tensor | None, want_grad: bool):
        """Return the step that makes logits their gradient, and keeps each row's loss."""

        def step(logits: torch.Tensor, start: int, stop: int) -> None:
            labels = self.tokens.pick(self.tokens.labels, start, stop)
            values = token_loss_(
                logits, labels, self.class_weight, self.options, want_grad, self.head.shard
            )
            if loss_N is not None:
                self.tokens.put(loss_N, values, start, stop)

        return step

    def forward(self, static: bool = False) -> tuple[torch.Tensor, _Saved]:
        """Losses [N]; d hidden, and d weight as far as it can be known before g.

        The gradient of the logits is kept for backward if one workspace held them all; with
        `static`, where shapes must follow from the inputs', if it could hold all N.
        """
        plan, tokens = self.plan, self.tokens
        n = tokens.labels.shape[0]
        rows = plan.workspace(n)
        sweep = Sweep(self.head, tokens, plan)
        if static:
            sweep.make_room(min(n, rows))
        sweep.start_hidden()
        sweep.start_head(few=n <= 2 * rows)
        new = torch.zeros if tokens.order.numel() else torch.empty  # left-out rows are zero
        loss_N = new(n, dtype=accumulate_dtype(sweep.logits), device=self.head.device)
        kept, stop = False, 0
        for begin, stop in sweep.workspaces(self._losses_to(loss_N, plan.want_grad), rows):
            sweep.add_hidden(begin, stop)
            kept = plan.want_head and tokens.supervised() <= (n if static else rows) <= rows
            if plan.want_head and plan.uniform and not kept:
                sweep.add_head(begin, stop, self.row_weight)
        dlogits = sweep.logits if kept else sweep.new_logits(0)
        return loss_N, _Saved(
            stop if kept else 0, dlogits, sweep.dbias, sweep.dhidden, sweep.dweight
        )

    def backward(self, g: torch.Tensor, saved: _Saved):
        """Gradients of hidden, weight (in its dtype) and bias; g is a scalar if uniform, else [N].

        Ignored rows get a gradient of exactly 0, also from an infinite or NaN g (a loss that was
        divided by a count of 0).
        """
        plan, tokens, dtypes = self.plan, self.tokens, self.head.dtypes
        tokens.check()
        supervised_N = tokens.labels != self.options.ignore_index
        scale_N = masked_scale(g if self.row_weight is None else g * self.row_weight, supervised_N)
        finished = saved.dbias, *saved.dhidden, *saved.dweight
        dhidden, dweight, dbias = scaled(finished, g, supervised_N, dtypes, scale_N)
        if not plan.want_head or dbias.numel() or any(d.numel() for d in dweight):
            return dhidden, dweight, dbias
        sweep = Sweep(self.head, tokens, plan, saved.dlogits)
        if saved.filled or not tokens.supervised():
            sweep.start_head(dtypes)
            sweep.add_head(0, saved.filled, scale_N)
            return dhidden, *sweep.head_gradient()
        # Forward knew neither g nor had room for all logits: logits once more.
        total = tokens.supervised()
        sweep.logits = sweep.new_logits(min(total, plan.workspace(total)))
        sweep.start_head(few=tokens.labels.shape[0] <= 2 * plan.rows)
        for begin, stop in sweep.again(0, total, self._losses_to(None, want_grad=True)):
            sweep.add_head(begin, stop, scale_N)
        return dhidden, *sweep.head_gradient()


# --- op registration -------------------------------------------------------------------------
# Eager calls go straight to the chunk loop; torch.compile sees these two ops. The shapes of their
# outputs follow from the inputs' shapes alone, so the workspace is kept only if all tokens, not
# just the supervised ones, fit it.

_STATIC = (
    "bool[] want_hidden, bool[] want_weight, bool want_bias, bool uniform, int rows, int first,"
    " int ignore_index, float label_smoothing, float z_loss, float scale,"
    " float? softcap"
)
_OPERANDS = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, Tensor labels, Tensor? class_weight,"
    " Tensor? row_weight"
)


def _flatten(plan: Plan, options: LossOptions) -> list:
    flat = [list(v) if isinstance(v, tuple) else v for v in dataclasses.astuple(plan)]
    return flat + list(dataclasses.astuple(options))


def _unflatten(want_hidden, want_weight, want_bias, uniform, rows, first, *options):
    plan = Plan(tuple(want_hidden), tuple(want_weight), want_bias, uniform, rows, first)
    return plan, LossOptions(*options)


def _launch_fwd(hidden, weight, bias, labels, class_weight, row_weight, *static):
    plan, options = _unflatten(*static)
    head = LinearHead(hidden, weight, bias)
    tokens = Tokens.of(labels, head.vocab, options.ignore_index, plan.first)
    loss, saved = _Call(head, tokens, class_weight, row_weight, plan, options).forward(static=True)
    filled = torch.tensor([saved.filled])
    return (loss, tokens.host.stats, tokens.order, filled, saved.dlogits, saved.dbias,
            saved.dhidden, saved.dweight)  # fmt: skip


def _fake_fwd(hidden, weight, bias, labels, class_weight, row_weight, *static):
    plan, _ = _unflatten(*static)
    n, vocab, like = labels.shape[0], weight[0].shape[0], hidden[0]
    accumulate = accumulate_dtype(like)
    kept = plan.want_head and n <= plan.rows
    summed = plan.want_head and plan.uniform and not kept
    few = n <= 2 * plan.rows
    return (
        like.new_empty(n, dtype=accumulate),
        labels.new_empty(2),
        labels.new_empty(n if n > plan.first else 0),
        torch.empty(1, dtype=torch.int64, device="cpu"),
        like.new_empty((n if kept else 0, vocab)),
        like.new_empty(vocab if summed and plan.want_bias else 0, dtype=accumulate),
        [h.new_empty(h.shape if w else 0) for h, w in zip(hidden, plan.want_hidden, strict=True)],
        [
            like.new_empty(w.shape if summed and want else 0, dtype=sum_dtype(w.dtype, few))
            for w, want in zip(weight, plan.want_weight, strict=True)
        ],
    )


def _launch_bwd(
    hidden, weight, bias, labels, class_weight, row_weight,
    g, stats, order, filled, dlogits, dbias, dhidden, dweight, *static,
):  # fmt: skip
    plan, options = _unflatten(*static)
    head = LinearHead(hidden, weight, bias)
    tokens = Tokens(labels, order, HostStats(stats), head.vocab)
    call = _Call(head, tokens, class_weight, row_weight, plan, options)
    return call.backward(g, _Saved(int(filled), dlogits, dbias, dhidden, dweight))


def _fake_bwd(hidden, weight, bias, labels, class_weight, row_weight, g, *rest):
    plan, _ = _unflatten(*rest[7:])
    accumulate = accumulate_dtype(hidden[0])
    return (
        [h.new_empty(h.shape if w else 0) for h, w in zip(hidden, plan.want_hidden, strict=True)],
        [
            w.new_empty(w.shape if want else 0)
            for w, want in zip(weight, plan.want_weight, strict=True)
        ],
        hidden[0].new_empty(weight[0].shape[0] if plan.want_bias else 0, dtype=accumulate),
    )


_linear_cross_entropy_fwd = register_op(
    f"linear_cross_entropy_fwd({_OPERANDS}, {_STATIC})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    _launch_fwd,
    _fake_fwd,
)
_linear_cross_entropy_bwd = register_op(
    f"linear_cross_entropy_bwd({_OPERANDS}, Tensor g, Tensor stats, Tensor order, Tensor filled,"
    f" Tensor dlogits, Tensor dbias, Tensor[] dhidden, Tensor[] dweight, {_STATIC})"
    " -> (Tensor[], Tensor[], Tensor)",
    _launch_bwd,
    _fake_bwd,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """(loss, stats): loss is the weighted sum over tokens if the plan is uniform, else [N]."""

    @staticmethod
    def forward(ctx, plan, options, shard, labels, class_weight, row_weight, *operands):
        head = LinearHead.unflatten(operands, shard)
        ctx.plan, ctx.options, ctx.shard, ctx.host = plan, options, shard, None
        if torch.compiler.is_compiling():
            loss, stats, order, filled, dlogits, dbias, dhidden, dweight = (
                _linear_cross_entropy_fwd(
                    head.hidden, head.weight, head.bias, labels, class_weight, row_weight,
                    *_flatten(plan, options),
                )
            )  # fmt: skip
        else:
            with on_device(labels):
                tokens = Tokens.of(labels, head.vocab, options.ignore_index, plan.first)
                call = _Call(head, tokens, class_weight, row_weight, plan, options)
                loss, saved = call.forward()
            ctx.host, stats, order = tokens.host, tokens.host.stats, tokens.order
            filled, dlogits, dbias = torch.tensor([saved.filled]), saved.dlogits, saved.dbias
            dhidden, dweight = saved.dhidden, saved.dweight
        ctx.save_for_backward(
            labels, class_weight, row_weight, stats, order, filled, dlogits, *operands,
            dbias, *dhidden, *dweight,
        )  # fmt: skip
        ctx.mark_non_differentiable(stats)
        if plan.uniform:
            loss = loss.sum() if row_weight is None else torch.dot(loss, row_weight.to(loss.dtype))
        return loss, stats

    @staticmethod
    @first_derivative_only
    def backward(ctx, g, _):
        labels, class_weight, row_weight, stats, order, filled, dlogits, *rest = ctx.saved_tensors
        plan, half = ctx.plan, len(rest) // 2
        head = LinearHead.unflatten(rest[:half], ctx.shard)
        dbias, dhidden, dweight = split(rest[half:])
        if torch.compiler.is_compiling():
            grads = _linear_cross_entropy_bwd(
                head.hidden, head.weight, head.bias, labels, class_weight, row_weight, g, stats,
                order, filled, dlogits, dbias, dhidden, dweight, *_flatten(plan, ctx.options),
            )  # fmt: skip
        else:
            with on_device(labels):
                tokens = Tokens(labels, order, ctx.host or HostStats(stats), head.vocab)
                call = _Call(head, tokens, class_weight, row_weight, plan, ctx.options)
                grads = call.backward(g, _Saved(int(filled), dlogits, dbias, dhidden, dweight))
        return *[None] * 6, *plan.gradients(*grads)


# --- public ----------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | int | None = None,
    options: LossOptions = LossOptions(),
    max_rows: int | None = None,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T + bias` with `labels`; the module says at what cost.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such. May be of another dtype (fp32 parameters, bf16
            hidden states); its gradient has its own dtype.
        labels: [...], int64; `options.ignore_index` marks tokens without loss and without cost.
        bias: [V].
        class_weight: [V], as `weight` of `torch.nn.functional.cross_entropy`.
        token_weight: [...]; multiplies each token's loss before the reduction.
        reduction: "none" (the shape of `labels`), "sum" or "mean" over supervised tokens.
        num_items_in_batch: if given, the summed loss is divided by it (HF gradient accumulation).
        max_rows: rows of logits held at once; default `workspace_rows`.
        shard: which rows `weight` and `bias` are, of a vocabulary that is split over ranks; V is
            then that of all, and the gradient of hidden this rank's part (`vocab_parallel.py`).

    Returns the loss in fp32. Gradients reach hidden, weight, bias and token_weight; nothing is
    computed or allocated for those that do not require them. Without any supervised token the loss
    and all gradients are 0.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for labels outside [0, V):
    at once where the host reads the token count, else in backward; the loss is NaN until then.
    """
    head = LinearHead.checked(hidden, weight, bias, shard)
    if shard is not None and torch.compiler.is_compiling():
        raise ValueError("a head that is split over ranks cannot be compiled")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    check_labels(labels, head.tokens, head.device)
    class_weight, row_weight = checked_weights(
        class_weight, token_weight, labels, head.vocab, options.ignore_index
    )
    labels_N = labels.reshape(-1).contiguous()
    # A weight that itself needs a gradient is applied outside, to the losses of the tokens.
    uniform = reduction != "none" and not (row_weight is not None and row_weight.requires_grad)

    loss, stats = _LinearCrossEntropy.apply(
        head.plan(labels_N.shape[0], uniform, max_rows), options, shard, labels_N, class_weight,
        row_weight if uniform else None, *head.flatten(),
    )  # fmt: skip
    if class_weight is None:
        count = stats[0].clamp_min(1)
    else:
        count = mean_denominator(labels_N, class_weight, options.ignore_index)
    if uniform:
        return scale_sum(loss, reduction, count, num_items_in_batch)
    loss = reduce_loss(loss, reduction, count, row_weight, num_items_in_batch)
    return loss.reshape(labels.shape) if reduction == "none" else loss
