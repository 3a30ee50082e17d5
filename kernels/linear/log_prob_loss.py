"""A loss of log-probabilities from hidden states and head weight: three GEMMs for any formula.

    scores = scores of sum_t hidden_t @ weight_t^T + bias with labels     (`scores.py`)
    total  = sum over groups of loss(scores of the group)

A group is a set of sequences whose loss depends on no other sequence: the pair of a preference
loss, one sequence of a policy loss, or the whole batch. As soon as the logits of a group are
computed, its loss is evaluated on a few numbers per token and differentiated by autograd, and the
group's d hidden and d weight are finished before the next logits overwrite the workspace. So a loss
written in a few lines of plain torch costs three GEMMs of 2 N H V FLOP (two with a frozen head, one
without gradient), with N the number of tokens with a label, and one workspace of memory. If a group
does not fit the workspace, its logits are computed twice (four GEMMs).

The gradient of the logits is computed before the caller scales the loss. In fp16 small gradients
underflow, so use bf16.

B sequences of T tokens, H hidden size, V vocabulary, G groups of K sequences (B = G K).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..autograd import depends_on, first_derivative_only
from ..logits.reduction import check_labels
from ..logits.scores import (
    DIFFERENTIABLE,
    ScoreGradients,
    ScoreOptions,
    TokenScores,
    check_outputs,
)
from ..runtime import on_device
from . import scoring
from .head import LinearHead
from .scoring import Scoring
from .supervised import HostStats, Tokens, partition
from .sweep import scale_gradients

Loss = Callable[[TokenScores, torch.Tensor, torch.Tensor], torch.Tensor]
"""loss(scores, mask, groups) -> [g]: fields of `scores` and `mask` (bool) are [g, K, T], zero where
a token has no label; `groups` [g], int64, holds the indices of these groups."""


def pairs(batch: int) -> torch.Tensor:
    """Return the groups [batch / 2, 2] of a batch whose first half is chosen, the second rejected.

    Raises ValueError if `batch` is odd.
    """
    if batch % 2:
        raise ValueError(
            f"{batch} sequences cannot be paired: the batch must hold as many rejected as chosen"
        )
    return torch.arange(batch).view(2, -1).T


class _Groups:
    """Evaluate the loss of groups of sequences, and its gradient with respect to the scores."""

    def __init__(self, loss: Loss, labels_BT: torch.Tensor, groups_GK: torch.Tensor, options):
        self.loss, self.groups = loss, groups_GK
        self.shape = labels_BT.shape
        self.mask_BT = labels_BT != options.ignore_index
        self.losses: list[torch.Tensor] = []
        self._gradients: dict[str, torch.Tensor] = {}

    def ends(self, tokens: Tokens) -> list[int]:
        """Return the row at which each group ends; waits for the counts from the device."""
        tokens.check()
        return list(itertools.accumulate(tokens.host.counts(self.groups.shape[0])))

    def evaluate(self, scores: TokenScores, first: int, last: int, want_grad: bool) -> None:
        """Evaluate groups `first` to `last` (exclusive); keep their losses, and gradients if
        wanted."""
        members = self.groups[first:last]
        picked = scores.map(lambda x: x.view(self.shape)[members])
        leaves = {name: getattr(picked, name) for name in DIFFERENTIABLE}
        leaves = {name: x for name, x in leaves.items() if x is not None}
        with torch.enable_grad():
            if want_grad:
                leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
            index = torch.arange(first, last, device=members.device)
            values = self.loss(picked._replace(**leaves), self.mask_BT[members], index)
            total = values.sum()
        if values.shape != (last - first,):
            raise ValueError(
                f"the loss of {last - first} groups must have shape ({last - first},), one value "
                f"for each, got {tuple(values.shape)}"
            )
        self.losses.append(values.detach())
        if not want_grad or not values.requires_grad:
            return
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                whole = self._gradients.setdefault(name, grad.new_zeros(self.shape))
                whole[members] = grad

    def gradient(self, scores: TokenScores, first: int, last: int) -> ScoreGradients:
        """Evaluate these groups, and return the gradients [N] of all groups so far."""
        if last > first:
            self.evaluate(scores, first, last, want_grad=True)
        if "log_probs" not in self._gradients:
            self._gradients["log_probs"] = scores.log_probs.new_zeros(self.shape)
        found = (self._gradients.get(name) for name in ScoreGradients._fields)
        return ScoreGradients(*(None if g is None else g.view(-1) for g in found))

    def total(self, like: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.losses).sum() if self.losses else like.new_zeros(())


class _LinearLogProbLoss(torch.autograd.Function):
    """Return (sum of all groups' losses, *scores)."""

    @staticmethod
    def forward(ctx, plan, options, outputs, groups, tokens, labels, *operands):
        head = LinearHead.unflatten(operands)
        ctx.plan, ctx.dtypes, ctx.ignore_index = plan, head.dtypes, options.ignore_index
        ctx.host, ctx.vocab = tokens.host, tokens.vocab
        grads = ()
        with on_device(labels):
            sweep = Scoring.start(head, tokens, plan, options, outputs)
            if plan.want_grad:
                scoring.forward_with_gradient(sweep, lambda: groups.ends(tokens), groups.gradient)
                grads = sweep.flat_gradients()
            else:
                scoring.forward(sweep)
                tokens.check()
                groups.evaluate(sweep.scores, 0, groups.groups.shape[0], want_grad=False)
        depends_on(ctx, *operands)
        ctx.save_for_backward(labels, *grads)
        fields = tuple(sweep.scores)
        ctx.mark_non_differentiable(*(x for x in fields if x is not None))
        return groups.total(sweep.scores.log_probs), *fields

    @staticmethod
    @first_derivative_only
    def backward(ctx, g, *_):
        labels, *grads = ctx.saved_tensors
        ctx.host.check(ctx.vocab)
        grads = scale_gradients(grads, g, labels != ctx.ignore_index, ctx.dtypes)
        return *[None] * 6, *ctx.plan.gradients(*grads)


# --- public ----------------------------------------------------------------------------------


@torch.compiler.disable(reason="the number of labeled tokens decides the shapes of the GEMMs")
def linear_log_prob_loss(
    hidden: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    loss: Loss,
    bias: torch.Tensor | None = None,
    *,
    groups: torch.Tensor | None = None,
    reduction: str = "mean",
    outputs: Sequence[str] = (),
    options: ScoreOptions = ScoreOptions(),
    max_rows: int | None = None,
) -> tuple[torch.Tensor, TokenScores]:
    """Return the loss of all groups, and the scores that it was computed from.

    The module's docstring states the cost in GEMMs and memory.

        dpo = DPOLoss(beta=0.1)
        loss, scores = linear_log_prob_loss(
            hidden, weight, labels, groups=pairs(len(labels)),
            loss=lambda scores, mask, i: dpo(scores.log_probs, mask, ref_log_probs[i]).loss)

    Args:
        hidden: [B, T, H], or a sequence of such, one for each term of the head.
        weight: [V, H], or a sequence of such; its gradient has its own dtype.
        labels: [B, T], int64: the token that each position predicts (shifted already);
            `options.ignore_index` marks positions without a label, which cost nothing.
        loss: called as `loss(scores, mask, groups)` for a few groups at a time; returns one value
            for each. It is differentiated with respect to log_probs, entropy and log_sum_exp; other
            tensors that it uses get no gradient.
        bias: [V].
        groups: [G, K], int64: the sequences of each group, each of the B sequences exactly once;
            `pairs` returns them for a preference batch. Default: each sequence is a group.
        reduction: "mean" over groups or "sum".
        outputs: further fields of `TokenScores` that the loss reads or the caller wants.
        max_rows: rows of logits held at once; default `workspace_rows`.

    Returns (loss, scores): a scalar in fp32 with gradients to hidden, weight and bias; scores
    [B, T], detached. torch.compile breaks the graph here.

    Raises ValueError if operands, groups or the result of `loss` do not fit, and for labels outside
    [0, V).
    """
    head = LinearHead.checked(hidden, weight, bias)
    outputs = check_outputs(outputs)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if labels.dim() != 2:
        raise ValueError(f"labels must be [B, T], got {tuple(labels.shape)}")
    check_labels(labels, head.tokens, head.device)
    groups = _checked_groups(groups, labels)
    members = groups.to(labels.device, non_blocking=True)
    labels_N = labels.reshape(-1).contiguous()
    with on_device(labels):
        order, stats = _group_order(labels, members, head.vocab, options)
        tokens = Tokens(labels_N, order, HostStats(stats), head.vocab)
    total, *fields = _LinearLogProbLoss.apply(
        head.plan(labels_N.shape[0], True, max_rows), options, outputs,
        _Groups(loss, labels, members, options), tokens, labels_N, *head.flatten(),
    )  # fmt: skip
    if reduction == "mean":
        total = total / max(groups.shape[0], 1)
    return total, TokenScores(*fields).reshape(labels.shape)


def _checked_groups(groups: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    batch = labels.shape[0]
    if groups is None:
        return torch.arange(batch).unsqueeze(1)
    if groups.dim() != 2 or groups.dtype != torch.int64 or groups.is_cuda:
        raise ValueError("groups must be an int64 tensor [G, K] on the CPU; see `pairs`")
    if not torch.equal(groups.flatten().sort().values, torch.arange(batch)):
        raise ValueError(f"groups must hold each of the {batch} sequences exactly once")
    return groups


def _group_order(labels_BT, groups_GK, vocab: int, options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order, stats): the tokens with a label first, group by group; and the stats of
    `partition`, followed by the number of labeled tokens of each group."""
    batch, length = labels_BT.shape
    sequence = groups_GK.flatten()
    grouped = labels_BT[sequence]
    order, stats = partition(grouped.flatten(), vocab, options.ignore_index, want_order=True)
    tokens = torch.arange(batch * length, device=labels_BT.device).view(batch, length)[sequence]
    counts = (grouped != options.ignore_index).view(*groups_GK.shape, length).sum((1, 2))
    return tokens.flatten()[order], torch.cat([stats, counts])
