"""The operands of a linear head, and the plan of a call.

    logits [N, V] = sum_t hidden_t [N, H_t] @ weight_t [V, H_t]^T + bias [V]

The sum has one term for a plain head; a head with a low-rank adapter has a second one
(hidden_2 = s * A x [N, r], weight_2 = B [V, r]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..runtime import use_triton
from .supervised import FIRST_ROWS
from .vocab_parallel import VocabShard
from .workspace import workspace, workspace_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which gradients one call must produce, and how many rows at a time; holds no tensors."""

    want_hidden: tuple[bool, ...]  # d hidden of each term
    want_weight: tuple[bool, ...]  # d weight of each term
    want_bias: bool
    uniform: bool  # g is one number for all tokens, apart from row weights given to forward
    rows: int  # the maximum rows of logits in the workspace
    first: int  # rows queued before the number of supervised tokens is known; at most `rows`

    @property
    def want_head(self) -> bool:
        return self.want_bias or any(self.want_weight)

    @property
    def want_grad(self) -> bool:
        return self.want_head or any(self.want_hidden)

    def workspace(self, n: int) -> int:
        """Return how many rows each workspace holds if n rows are processed."""
        return workspace(n, self.rows)

    def gradients(self, dhidden, dweight, dbias) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of `LinearHead.flatten()`, None where not wanted.

        autograd casts d bias to the dtype of the bias.
        """
        wanted = (self.want_bias, *self.want_hidden, *self.want_weight)
        grads = (dbias, *dhidden, *dweight)
        return tuple(d if want else None for d, want in zip(grads, wanted, strict=True))


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """The operands of the logits; `shard` states which rows weight and bias hold, if not all."""

    hidden: Sequence[torch.Tensor]  # [..., H_t] each
    weight: Sequence[torch.Tensor]  # [V, H_t] each
    bias: torch.Tensor | None = None  # [V]
    shard: VocabShard | None = None

    @classmethod
    def checked(cls, hidden, weight, bias, shard: VocabShard | None = None) -> LinearHead:
        """Return the head of tensors, or of sequences of them; raise ValueError if they do not fit
        each other."""
        hidden = [hidden] if torch.is_tensor(hidden) else list(hidden)
        weight = [weight] if torch.is_tensor(weight) else list(weight)
        if not hidden or len(hidden) != len(weight):
            raise ValueError(f"{len(hidden)} hidden states for {len(weight)} weights")
        for h, w in zip(hidden, weight, strict=True):
            if not h.is_floating_point() or not w.is_floating_point():
                raise ValueError(f"hidden and weight must be floating point: {h.dtype}, {w.dtype}")
            if w.dim() != 2 or h.shape[-1] != w.shape[1] or w.shape[0] != weight[0].shape[0]:
                raise ValueError(f"hidden {tuple(h.shape)} does not fit weight {tuple(w.shape)}")
            one_device = h.device == w.device == hidden[0].device
            if not one_device or h.shape[:-1] != hidden[0].shape[:-1]:
                raise ValueError("hidden states and weights must share device and leading shape")
        (rows, _) = weight[0].shape
        if shard is not None and rows != shard.rows:
            raise ValueError(
                f"weight {tuple(weight[0].shape)} is not the shard of {shard.rows} rows"
            )
        if bias is not None:
            if bias.shape != (rows,):
                raise ValueError(f"bias must have shape ({rows},), got {tuple(bias.shape)}")
            if bias.device != hidden[0].device or not bias.is_floating_point():
                raise ValueError(
                    f"bias must be floating point on {hidden[0].device}, got {bias.dtype} on "
                    f"{bias.device}"
                )
        return cls(hidden, weight, bias, shard)

    @classmethod
    def sum(cls, heads: Sequence[LinearHead]) -> LinearHead:
        """Return one head with the terms of all `heads`, and the bias and shard of the first."""
        first = heads[0]
        hidden, weight = [h for x in heads for h in x.hidden], [w for x in heads for w in x.weight]
        return cls(hidden, weight, first.bias, first.shard)

    def flatten(self) -> tuple[torch.Tensor | None, ...]:
        """Return the flat operands that autograd functions take, with hidden states [N, H_t] of one
        dtype, in which the GEMMs run."""
        dtype = self.hidden[0].dtype
        hidden = (h.reshape(-1, h.shape[-1]).to(dtype) for h in self.hidden)
        return self.bias, *hidden, *self.weight

    @classmethod
    def unflatten(cls, tensors, shard: VocabShard | None = None) -> LinearHead:
        bias, hidden, weight = split(tensors)
        return cls(hidden, weight, bias, shard)

    @property
    def tokens(self) -> torch.Size:
        """The leading shape of the hidden states."""
        return self.hidden[0].shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    @property
    def rows(self) -> int:
        """Rows of the weight: columns of the logits."""
        return self.weight[0].shape[0]

    @property
    def vocab(self) -> int:
        """The size of the vocabulary; more than `rows` if the weight is one rank's shard."""
        return self.rows if self.shard is None else self.shard.vocab

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of the weights, and therefore of their gradients."""
        return [w.dtype for w in self.weight]

    @property
    def trainable_width(self) -> int:
        """Columns of the weights that get a gradient."""
        return sum(w.shape[1] for w in self.weight if w.requires_grad and torch.is_grad_enabled())

    def cast(self) -> LinearHead:
        """Return the head with weights and bias in the dtype of the hidden states."""
        dtype = self.hidden[0].dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return LinearHead(self.hidden, [w.to(dtype) for w in self.weight], bias, self.shard)

    def logits(self) -> torch.Tensor:
        """Return all logits at once, computed by torch operations that autograd records."""
        terms = [h @ w.to(h.dtype).t() for h, w in zip(self.hidden, self.weight, strict=True)]
        logits = sum(terms[1:], terms[0])
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def plan(self, n: int, uniform: bool, max_rows: int | None = None) -> Plan:
        """Return the plan for n tokens: which gradients are required, and how many rows at once.

        If the head is split over ranks, all of them get the same number of rows. Raise ValueError
        unless `max_rows` is positive or None.
        """
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be positive or None, got {max_rows}")
        enabled, like = torch.is_grad_enabled(), self.hidden[0]
        columns = self.rows if self.shard is None else self.shard.largest
        rows = max_rows or workspace_rows(
            n, columns, self.trainable_width, like, workspaces=2 if uniform else 1
        )
        return Plan(
            want_hidden=tuple(h.requires_grad and enabled for h in self.hidden),
            want_weight=tuple(w.requires_grad and enabled for w in self.weight),
            want_bias=self.bias is not None and self.bias.requires_grad and enabled,
            uniform=uniform,
            rows=rows,
            first=min(rows, FIRST_ROWS) if use_triton(like) else 0,  # a CPU knows the count at once
        )


def split(flat):
    """Return (bias, hidden, weight) from operands in the order of `LinearHead.flatten`, or from
    their gradients."""
    bias, *terms = flat
    half = len(terms) // 2
    return bias, terms[:half], terms[half:]
