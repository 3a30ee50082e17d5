"""Losses of ranks that hold parts of each row, as engines for long sequences split them.

Two neighboring ranks share the tokens of a row: halves, or its ends and its middle. Attention
reaches over both: it is registered under torch's name, as such engines do, takes no mask, and gets
keys and values from the other rank. Labels are shifted before the row is split, so that the last
token of a part has one. Every loss is such that its mean over the ranks is that of whole rows.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import LENGTH, VOCAB

HALF = LENGTH // 2
QUARTER = LENGTH // 4
ORDERS = {
    "halves": torch.arange(LENGTH).view(2, HALF),
    "ends and middle": torch.tensor([
        [*range(QUARTER), *range(LENGTH - QUARTER, LENGTH)],
        [*range(QUARTER, LENGTH - QUARTER)],
    ]),
}  # fmt: skip


@functools.cache
def group() -> dist.ProcessGroup:
    """Return the group of this rank and its neighbor."""
    pairs = [dist.new_group([i, i + 1]) for i in range(0, dist.get_world_size(), 2)]
    return pairs[dist.get_rank() // 2]


class _FromBoth(torch.autograd.Function):
    """Concatenate the tensors of both ranks along dimension 2."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, x.contiguous(), group=group())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group())
        return grad.chunk(2, 2)[dist.get_rank() % 2]


class _OverBoth(torch.autograd.Function):
    """Return the sum of both ranks' values on each rank."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total, group=group())
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=group())
        return grad


@contextlib.contextmanager
def attention_over_both(order: torch.Tensor):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        own, every = order[dist.get_rank() % 2], order.flatten()
        mask = own[:, None] >= every[None]
        out = F.scaled_dot_product_attention(
            query, _FromBoth.apply(key), _FromBoth.apply(value), mask, scale=scaling,
            enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


class Split:
    """The part of a batch that this rank has."""

    def __init__(self, order: torch.Tensor, ids, labels):
        own = order[dist.get_rank() % 2]
        self.shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:][:, own].contiguous()
        self.inputs = {"input_ids": ids[:, own], "position_ids": own.expand(len(ids), -1).clone()}
        self.labels = labels[:, own]
        self.count = (labels[:, 1:] != -100).sum() / 2  # the mean over two ranks divides by two


def in_the_forward(order, model, ids, labels):
    part = Split(order, ids, labels)
    with attention_over_both(order):
        return model(
            **part.inputs, labels=part.labels, shift_labels=part.shift_labels,
            num_items_in_batch=part.count,
        ).loss  # fmt: skip


def outside(order, model, ids, labels):
    from liger_trainer import loss_scope

    part = Split(order, ids, labels)
    with attention_over_both(order), loss_scope():
        rows = model(**part.inputs).logits.reshape(-1, VOCAB).float()
        total = F.cross_entropy(
            rows, part.shift_labels.flatten(), label_smoothing=0.1, reduction="sum"
        )
    return total / part.count


def from_log_probs(order, model, ids, labels):
    from liger_trainer import loss_scope
    from liger_trainer.deferred.token_scores import token_scores

    part = Split(order, ids, labels)
    with attention_over_both(order), loss_scope():
        scores = token_scores(model(**part.inputs).logits, part.shift_labels)
    chosen, rejected = _OverBoth.apply(scores.log_probs.sum(-1)).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def with_own_term(order, model, ids, labels):
    part = Split(order, ids, labels)
    with attention_over_both(order):
        outputs = model(
            **part.inputs, labels=part.labels, shift_labels=part.shift_labels,
            num_items_in_batch=part.count,
        )  # fmt: skip
        return outputs.loss + 0.01 * outputs.logits.float().pow(2).mean()


def _losses(order: torch.Tensor):
    named = {
        "labels": in_the_forward,
        "own loss": outside,
        "log-probabilities": from_log_probs,
        "own term": with_own_term,
    }
    return {name: functools.partial(loss, order) for name, loss in named.items()}


HALVES, BALANCED = (_losses(order) for order in ORDERS.values())
