"""Validate the operands of a linear head, plan the chunk loop, cast to the compute dtype."""

from __future__ import annotations

import functools

import torch

from ..runtime import use_triton
from .head import Head, Plan
from .supervised import FIRST_ROWS, HostStats
from .vocab_parallel import ShardedHead, VocabShard
from .workspace import workspace_rows


def checked_operands(hidden, weight, bias, shard: VocabShard | None = None):
    """Return the first two as lists of terms; ValueError if they do not fit each other."""
    hidden = [hidden] if torch.is_tensor(hidden) else list(hidden)
    weight = [weight] if torch.is_tensor(weight) else list(weight)
    if not hidden or len(hidden) != len(weight):
        raise ValueError(f"{len(hidden)} hidden states for {len(weight)} weights")
    for h, w in zip(hidden, weight, strict=True):
        if not h.is_floating_point() or not w.is_floating_point():
            raise ValueError(f"hidden and weight must be floating point: {h.dtype}, {w.dtype}")
        if w.dim() != 2 or h.shape[-1] != w.shape[1] or w.shape[0] != weight[0].shape[0]:
            raise ValueError(f"hidden {tuple(h.shape)} does not fit weight {tuple(w.shape)}")
        if h.device != w.device or h.shape[:-1] != hidden[0].shape[:-1]:
            raise ValueError("hidden states and weights must share device and leading shape")
    if shard is not None and weight[0].shape[0] != shard.rows:
        raise ValueError(f"weight {tuple(weight[0].shape)} is not the shard of {shard.rows} rows")
    if bias is not None and bias.shape != weight[0].shape[:1]:
        raise ValueError(f"bias must have shape ({weight[0].shape[0]},), got {tuple(bias.shape)}")
    return hidden, weight, bias


def classes(weight, shard: VocabShard | None) -> int:
    """Return the vocabulary of a head whose weight may be one rank's part."""
    return weight[0].shape[0] if shard is None else shard.vocab


def make_plan(
    hidden, weight, bias, labels_N, uniform: bool, max_rows: int | None,
    shard: VocabShard | None = None,
) -> Plan:  # fmt: skip
    """Return what the operands that require a gradient ask for; the same on all ranks of a
    shard."""
    enabled = torch.is_grad_enabled()
    want_weight = tuple(w.requires_grad and enabled for w in weight)
    width = sum(w.shape[1] for w, want in zip(weight, want_weight, strict=True) if want)
    rows = max_rows or workspace_rows(
        labels_N.shape[0], weight[0].shape[0] if shard is None else shard.largest, width, hidden[0],
        workspaces=2 if uniform else 1,
    )  # fmt: skip
    return Plan(
        want_hidden=tuple(h.requires_grad and enabled for h in hidden),
        want_weight=want_weight,
        want_bias=bias is not None and bias.requires_grad and enabled,
        uniform=uniform,
        rows=rows,
        first=min(rows, FIRST_ROWS) if use_triton(labels_N) else 0,  # a CPU knows the count at once
    )


def make_head(
    hidden, weight, bias, labels_N, options, order, host: HostStats, class_weight=None,
    shard: VocabShard | None = None,
) -> Head:  # fmt: skip
    """Return the operands in the dtype of the hidden states, in which the GEMMs run."""
    dtype = hidden[0].dtype
    make = Head if shard is None else functools.partial(ShardedHead, shard=shard)
    return make(
        hidden=[h.to(dtype) for h in hidden],
        weight=[w.to(dtype) for w in weight],
        bias=None if bias is None else bias.to(dtype),
        labels=labels_N,
        class_weight=class_weight,
        options=options,
        order=order,
        host=host,
    )
