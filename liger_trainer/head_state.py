"""What logits are made of: hidden states, a head, and what the model did to their product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Term:
    """hidden [..., H] @ weight [V, H]^T, one summand of the logits."""

    hidden: torch.Tensor
    weight: torch.Tensor


@dataclasses.dataclass(frozen=True)
class HeadState:
    """Everything that the logits are made of.

    `ops` is what happened to them since, in order: ("cast", dtype), ("mul", c), ("div", c),
    ("tanh", None), ("log_softmax", None).
    """

    terms: tuple[Term, ...]
    bias: torch.Tensor | None
    dtype: torch.dtype  # in which the head's products run and return
    fused: bool
    ops: tuple[tuple[str, object], ...] = ()
    versions: tuple[int, ...] = ()

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        terms = [tensor for term in self.terms for tensor in (term.hidden, term.weight)]
        return (*terms, self.bias)

    @property
    def shape(self) -> torch.Size:
        first = self.terms[0]
        return first.hidden.shape[:-1] + first.weight.shape[:1]

    @property
    def current_dtype(self) -> torch.dtype:
        casts = [value for name, value in self.ops if name == "cast"]
        return casts[-1] if casts else self.dtype

    def map_hidden(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> HeadState:
        terms = tuple(Term(fn(term.hidden), term.weight) for term in self.terms)
        return dataclasses.replace(self, terms=terms)

    def detach(self) -> HeadState:
        terms = tuple(Term(term.hidden.detach(), term.weight.detach()) for term in self.terms)
        bias = None if self.bias is None else self.bias.detach()
        return dataclasses.replace(self, terms=terms, bias=bias)

    def then(self, name: str, value: object = None) -> HeadState:
        return dataclasses.replace(self, ops=(*self.ops, (name, value)))

    def compute(self, *operands: torch.Tensor | None) -> torch.Tensor:
        """The logits, by the very operations of the plain model."""
        *flat, bias = operands or self.operands
        with torch.autocast(flat[0].device.type, enabled=False):
            value = None
            for hidden, weight in zip(flat[::2], flat[1::2], strict=True):
                own_bias = bias.to(self.dtype) if bias is not None and value is None else None
                part = F.linear(hidden.to(self.dtype), weight.to(self.dtype), own_bias)
                value = part if value is None else value + part
            for name, argument in self.ops:
                value = _REPLAY[name](value, argument)
        return value

    def check_versions(self) -> None:
        """Logits stand for the time of the forward: later changes of the operands void them."""
        now = tuple(t._version for t in self.operands if t is not None)
        if self.versions and now != self.versions:
            raise RuntimeError(
                "These logits were not computed during the forward, and the weights or hidden "
                "states that they are made of have changed since (an optimizer step?). Read "
                "outputs.logits before the change, or call restore(model) for plain logits."
            )


_REPLAY: dict[str, Callable[[torch.Tensor, object], torch.Tensor]] = {
    "cast": lambda value, dtype: value.to(dtype),
    "mul": lambda value, factor: value * factor,
    "div": lambda value, divisor: value / divisor,
    "tanh": lambda value, _: torch.tanh(value),
    "log_softmax": lambda value, _: F.log_softmax(value, dim=-1),
}


def summarise(ops: tuple[tuple[str, object], ...]) -> tuple[float, float | None] | None:
    """(scale, softcap) such that the ops are softcap * tanh(scale * z / softcap); else None."""
    inner, outer = 1.0, None
    for name, argument in ops:
        if name in ("mul", "div"):
            factor = argument if name == "mul" else 1.0 / argument
            if outer is None:
                inner *= factor
            else:
                outer *= factor
        elif name == "tanh":
            if outer is not None:
                return None
            outer = 1.0
    if outer is None:
        return (inner, None) if math.isfinite(inner) else None
    return (inner * outer, outer) if outer > 0 and math.isfinite(inner * outer) else None
