"""How deferred logits are computed: a call of the head, and what is done to its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from liger_trainer.deferred.head_call import Term
from liger_trainer.deferred.origin import Origin
from liger_trainer.kernels.linear.head import LinearHead
from liger_trainer.kernels.logits.transform import Transform


@dataclasses.dataclass(frozen=True)
class State:
    """How to compute deferred logits from the head's input.

    `ops` are the operations applied to them, in order: ("cast", dtype), ("add", bias),
    ("columns", slice of the vocabulary), ("mul", c), ("div", c), ("tanh", None),
    ("log_softmax", None), ("move", device).
    """

    origin: Origin
    terms: tuple[Term, ...]
    ops: tuple[tuple[str, Any], ...] = ()

    def map_hidden(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> State:
        terms = tuple(term._replace(hidden=fn(term.hidden)) for term in self.terms)
        return dataclasses.replace(self, terms=terms)

    def with_op(self, name: str, value: object = None) -> State:
        return dataclasses.replace(self, ops=(*self.ops, (name, value)))

    @property
    def transform(self) -> Transform | None:
        """The scale and softcap that `ops` amount to, beside the bias; None if a kernel cannot
        express them."""
        found = as_scale_and_softcap(self.ops)
        return None if found is None else Transform(*found)

    @property
    def changes_head(self) -> bool:
        """Whether `ops` add a bias to the head, or take some of its columns."""
        return any(name in ("add", "columns") for name, _ in self.ops)

    def with_ops(self, head: LinearHead) -> LinearHead:
        """Return the head with the bias and the columns of `ops`, which have no part in a
        `transform`."""
        weight, bias = head.weight, head.bias
        for name, argument in self.ops:
            if name == "add":
                bias = argument if bias is None else bias + argument
            elif name == "columns":
                weight = [w[argument] for w in weight]
                bias = None if bias is None else bias[argument]
        return dataclasses.replace(head, weight=weight, bias=bias)

    @property
    def device(self) -> torch.device:
        moves = [argument for name, argument in self.ops if name == "move"]
        return moves[-1] if moves else self.origin.device

    @property
    def has_log_softmax(self) -> bool:
        return any(name == "log_softmax" for name, _ in self.ops)


def as_scale_and_softcap(ops) -> tuple[float, float | None] | None:
    """Return (scale, softcap) such that `ops` compute softcap * tanh(scale * z / softcap).

    Return None if they compute something else, or if the factors are so large or small that an
    intermediate result might overflow.
    """
    inner, outer = 1.0, None
    for name, argument in ops:
        if name == "move":
            return None
        if name in ("mul", "div"):
            factor = argument if name == "mul" else 1.0 / argument
            if outer is None:
                inner *= factor
            else:
                outer *= factor
            product = abs(inner if outer is None else inner * outer)
            if product and not 1 / _LARGE < product < _LARGE:
                return None
        elif name == "tanh":
            if outer is not None:
                return None
            outer = 1.0
    if outer is None:
        return inner, None
    return (inner * outer, outer) if outer > 0 else None


_LARGE = 2.0**32


OPS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "cast": lambda value, dtype: value.to(dtype),
    "add": lambda value, bias: value + bias,
    "columns": lambda value, columns: value[..., columns],
    "mul": lambda value, factor: value * factor,
    "div": lambda value, divisor: value / divisor,
    "tanh": lambda value, _: torch.tanh(value),
    "log_softmax": lambda value, _: F.log_softmax(value, dim=-1),
    "move": lambda value, device: value.to(device),
}


def replay(ops, value: torch.Tensor) -> torch.Tensor:
    """Apply recorded operations to logits, exactly as the plain model does."""
    for name, argument in ops:
        value = OPS[name](value, argument)
    return value
