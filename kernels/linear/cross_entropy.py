"""Linear head and cross entropy in one operation that never holds all logits.

    logits = sum_t hidden_t @ weight_t^T + bias          loss = cross_entropy(logits, labels)

for N tokens, hidden size H, vocabulary V. The sum has one term for a plain head; a head with a
low-rank adapter has a second one (hidden_2 = s * A x [N, r], weight_2 = B [V, r]).

Cost. The floor for a trainable head is three GEMMs of 2 N H V FLOP (logits, d hidden,
d weight), with N the number of *supervised* tokens. No others run: tokens whose label is
`ignore_index` are dropped before the first GEMM (except among the first `FIRST_ROWS` tokens, see
`supervised.py`), and logits are overwritten with their gradient.

    reduction           head trainable                                   head frozen
    "sum", "mean"       3 GEMMs                                       2
    "none"              3 if the logits fit the workspace, else 4        2

Memory. One workspace of logits (`workspace.py`). If all supervised tokens fit it, their gradient is
kept until backward, where d weight is a single GEMM, accumulated in fp32 by the hardware. Over
two workspaces, d weight is summed in its own dtype: the second GEMM adds to the rounded result of
the first. Over more, it is summed in an fp32 buffer and rounded once.

Row scaling. d loss_n / d logits is known up to the factor g_n that backward receives. It scales the
rows of d hidden and, for d weight, the rows of `hidden` (N x H): never the logits (N x V).

Formula of the loss, options and sources: `loss.py`. The chunk loop: `token_losses.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..autograd import first_derivative_only
from ..logits.loss import LossOptions, cross_entropy_reference
from ..logits.reduction import (
    check_labels,
    check_reduction,
    checked_weights,
    mean_denominator,
    reduce_loss,
    scale_sum,
)
from ..logits.transform import accumulate_dtype
from ..runtime import on_device, register_op
from .head import LinearHead, Plan, split
from .supervised import HostStats, Tokens
from .token_losses import SavedForBackward, TokenLosses
from .vocab_parallel import VocabShard
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
    """Return the loss of each token [N], from all logits at once."""
    logits_NV = LinearHead(hidden, weight, bias_V).logits()
    return cross_entropy_reference(logits_NV, labels_N, class_weight_V, options)


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


def _forward(head: LinearHead, labels, class_weight, row_weight, plan, options, static: bool):
    """Return the counts, which are being copied to the host, and the op's outputs."""
    tokens = Tokens.of(labels, head.vocab, options.ignore_index, plan.first)
    call = TokenLosses(head, tokens, class_weight, row_weight, plan, options)
    loss, (filled, *saved) = call.forward(static)
    return tokens.host, (loss, tokens.host.stats, tokens.order, torch.tensor([filled]), *saved)


def _launch_fwd(hidden, weight, bias, labels, class_weight, row_weight, *static):
    head = LinearHead(hidden, weight, bias)
    plan, options = _unflatten(*static)
    return _forward(head, labels, class_weight, row_weight, plan, options, static=True)[1]


def _empty(tensors, wanted) -> list[torch.Tensor]:
    """Return an empty gradient for each tensor; those that are not wanted have no elements."""
    return [x.new_empty(x.shape if want else 0) for x, want in zip(tensors, wanted, strict=True)]


def _fake_fwd(hidden, weight, bias, labels, class_weight, row_weight, *static):
    plan, _ = _unflatten(*static)
    n, vocab, like = labels.shape[0], weight[0].shape[0], hidden[0]
    accumulate = accumulate_dtype(like)
    kept = plan.want_head and n <= plan.rows
    summed = plan.want_head and plan.uniform and not kept
    at_most_two = n <= 2 * plan.rows
    return (
        like.new_empty(n, dtype=accumulate),
        labels.new_empty(2),
        labels.new_empty(n if n > plan.first else 0),
        torch.empty(1, dtype=torch.int64, device="cpu"),
        like.new_empty((n if kept else 0, vocab)),
        like.new_empty(vocab if summed and plan.want_bias else 0, dtype=accumulate),
        _empty(hidden, plan.want_hidden),
        [
            like.new_empty(w.shape if summed and want else 0, dtype=sum_dtype(w.dtype, at_most_two))
            for w, want in zip(weight, plan.want_weight, strict=True)
        ],
    )


def _launch_bwd(
    hidden, weight, bias, labels, class_weight, row_weight,
    g, stats, order, filled, dlogits, dbias, dhidden, dweight, *static,
):  # fmt: skip
    head = LinearHead(hidden, weight, bias)
    plan, options = _unflatten(*static)
    tokens = Tokens(labels, order, HostStats(stats), head.vocab)
    call = TokenLosses(head, tokens, class_weight, row_weight, plan, options)
    return call.backward(g, SavedForBackward(int(filled), dlogits, dbias, dhidden, dweight))


def _fake_bwd(hidden, weight, bias, labels, class_weight, row_weight, g, *rest):
    plan, _ = _unflatten(*rest[7:])
    accumulate = accumulate_dtype(hidden[0])
    return (
        _empty(hidden, plan.want_hidden),
        _empty(weight, plan.want_weight),
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
    """Return (loss, stats): loss is the weighted sum over tokens if the plan is uniform, else
    [N]."""

    @staticmethod
    def forward(ctx, plan, options, shard, labels, class_weight, row_weight, *operands):
        head = LinearHead.unflatten(operands, shard)
        ctx.plan, ctx.options, ctx.shard, ctx.host = plan, options, shard, None
        if torch.compiler.is_compiling():
            found = _linear_cross_entropy_fwd(
                head.hidden, head.weight, head.bias, labels, class_weight, row_weight,
                *_flatten(plan, options),
            )  # fmt: skip
        else:
            with on_device(labels):
                ctx.host, found = _forward(
                    head, labels, class_weight, row_weight, plan, options, static=False
                )
        loss, stats, order, filled, dlogits, dbias, dhidden, dweight = found
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
                call = TokenLosses(head, tokens, class_weight, row_weight, plan, ctx.options)
                grads = call.backward(
                    g, SavedForBackward(int(filled), dlogits, dbias, dhidden, dweight)
                )
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
    """Return the cross entropy of `hidden @ weight.T + bias` with `labels`.

    The module's docstring states the cost in GEMMs and memory.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such. May have another dtype (fp32 parameters, bf16
            hidden states); its gradient has its own dtype.
        labels: [...], int64; `options.ignore_index` marks tokens without loss and without cost.
        bias: [V].
        class_weight: [V], as `weight` of `torch.nn.functional.cross_entropy`.
        token_weight: [...]; multiplies each token's loss before the reduction.
        reduction: "none" (the shape of `labels`), "sum" or "mean" over supervised tokens.
        num_items_in_batch: if given, the summed loss is divided by it (HF gradient accumulation);
            refused with "none".
        max_rows: rows of logits held at once; default `workspace_rows`.
        shard: which rows of the vocabulary `weight` and `bias` hold, if it is split over ranks. V
            is then the whole vocabulary, and the gradient of hidden is this rank's part
            (`vocab_parallel.py`).

    Returns the loss in fp32. Gradients reach hidden, weight, bias and token_weight; nothing is
    computed or allocated for those that do not require them. Without any supervised token the loss
    and all gradients are 0.

    Raises ValueError if shapes, dtypes or devices do not fit, and for labels outside [0, V): at
    once where the host reads the token count, else in backward; the loss is NaN until then.
    """
    head = LinearHead.checked(hidden, weight, bias, shard)
    if shard is not None and torch.compiler.is_compiling():
        raise ValueError("a head that is split over ranks cannot be compiled")
    check_reduction(reduction, num_items_in_batch)
    check_labels(labels, head.tokens, head.device)
    class_weight, row_weight = checked_weights(
        class_weight, token_weight, labels, head.vocab, options.ignore_index,
        accumulate_dtype(head.hidden[0]),
    )  # fmt: skip
    labels_N = labels.reshape(-1).contiguous()
    # A token weight that requires a gradient is applied afterwards, to the losses of the tokens.
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
