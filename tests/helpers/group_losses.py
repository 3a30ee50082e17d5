"""A small batch, losses of groups of its sequences, and these from all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from heads import VOCAB, WIDTH

from liger_trainer.kernels.linear.log_prob_loss import pairs
from liger_trainer.kernels.linear.log_probs import linear_log_probs_reference
from liger_trainer.kernels.logits.scores import ScoreOptions

BATCH, LENGTH = 4, 5
LABELED = (4, 5, 4, 5)  # of each sequence
GROUPS = {
    "sequences": None,
    "pairs": pairs(BATCH),
    "batch": torch.tensor([[2, 0, 3, 1]]),
}
ROWS = {"one workspace": 32, "some groups": 9, "parts of groups": 3}

every_grouping = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
every_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


def problem(device, dtype=torch.float32, labeled=LABELED, length=LENGTH):
    tensors = {
        "hidden": torch.randn(len(labeled), length, WIDTH).to(device, dtype),
        "weight": torch.randn(VOCAB, WIDTH).to(device, dtype),
        "bias": torch.randn(VOCAB).to(device, dtype),
    }
    labels = torch.randint(0, VOCAB, (len(labeled), length))
    for row, count in zip(labels, labeled, strict=True):
        row[torch.randperm(length)[count:]] = -100
    return tensors, labels.to(device)


def preference(scores, mask, groups):
    """Of the mean log-probability of a group's first sequence against the others', by a margin.

    The sequences of a group depend on each other, and each group has a margin of its own.
    """
    means = scores.log_probs.sum(-1) / mask.sum(-1).clamp_min(1)
    others = means[:, 1:].sum(1) / max(means.shape[1] - 1, 1)
    return F.softplus(others - means[:, 0] + 0.5 * groups - 1.0)


def with_entropy(scores, mask, groups):
    bonus = scores.entropy.square() + 0.1 * scores.log_sum_exp.sin()
    return preference(scores, mask, groups) + (bonus * mask).sum((1, 2))


def unfused(
    hidden, weight, bias, labels, loss, groups=None, reduction="mean", outputs=(),
    options=ScoreOptions(),
):  # fmt: skip
    """Return (loss, scores) from all logits at once, with all groups in one call of `loss`."""
    if groups is None:
        groups = torch.arange(len(labels)).unsqueeze(1)
    groups = groups.to(labels.device)
    scores = linear_log_probs_reference(
        [hidden.reshape(-1, WIDTH)], [weight], labels.flatten(), bias, options, outputs
    ).map(lambda x: x.view(labels.shape))
    index = torch.arange(len(groups), device=labels.device)
    mask = labels != options.ignore_index
    losses = loss(scores.map(lambda x: x[groups]), mask[groups], index)
    return losses.sum() if reduction == "sum" else losses.mean(), scores
