"""The formulas of rotary position embeddings, and how functions of them are called."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class RotaryForm:
    """One formula of a rotary embedding: the options of `kernels.rope`."""

    interleaved: bool = False
    split: bool = False
    half_table: bool = False
    narrow_table: bool = False
    inverse: bool = False
    trailing: bool = False
    keep_dtype: bool = False

    def rotated(self, table: torch.Tensor) -> int:
        """Return how many channels a table of this width rotates."""
        return table.shape[-1] * (2 if self.narrow_table else 1)

    def __str__(self) -> str:
        options = {
            "returns them apart": self.split,
            "half a table": self.half_table,
            "a table of half the width": self.narrow_table,
            "opposite angle": self.inverse,
            "the last channels": self.trailing,
            "cast back": self.keep_dtype,
        }
        pairs = "rotates neighbors" if self.interleaved else "rotates halves"
        return ", ".join([pairs, *(text for text, on in options.items() if on)])


FORMS = tuple(
    RotaryForm(*lies, inverse, trailing, keep_dtype)
    for lies in (  # interleaved, split, half_table, narrow_table
        (False, False, False, False),
        (False, False, False, True),
        (True, False, False, False),
        (True, False, False, True),
        (True, False, True, False),
        (True, True, False, False),
        (True, True, True, False),
    )
    for inverse in (False, True)
    for trailing in (False, True)
    for keep_dtype in (False, True)
)


class Layout(NamedTuple):
    """Which dimension of the states is the length, and which the heads; how the tables lie."""

    rank: int
    heads: int
    one_table: bool = False  # one for all samples

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` as [B, H, S, D]: itself or a view."""
        if self == HEADS_FIRST:
            return x
        return (x.unsqueeze(0) if self.rank == 3 else x).transpose(1, 2)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `states`."""
        if self == HEADS_FIRST:
            return x
        x = x.transpose(1, 2)
        return x.squeeze(0) if self.rank == 3 else x

    def table(self, table: torch.Tensor) -> torch.Tensor:
        """Return a view of a table as [B, S, R]."""
        if self.one_table:
            return table.transpose(0, 1)
        return table.unsqueeze(0) if self.rank == 3 else table


HEADS_FIRST, LENGTH_FIRST = Layout(4, 1), Layout(4, 2)  # [B, H, S, D] and [B, S, H, D]
NO_BATCH = Layout(3, 1)  # [S, H, D], with tables [S, R]: the patches of all images in one row
ONE_TABLE = Layout(4, 2, one_table=True)  # [B, S, H, D], with tables [S, 1, R]


@dataclasses.dataclass(frozen=True)
class RotaryCall:
    """How a rotary function takes states, tables and the heads' dimension.

    The states are one, or q and k; the tables are cos and sin, or one of complex numbers.
    """

    names: tuple[str, ...]  # of all its parameters
    states: tuple[str, ...]
    tables: tuple[str, ...]
    dim: str | None  # name of the parameter for the heads' dimension in the states
    default: int = 1  # default of that parameter
    layouts: tuple[Layout, ...] = ()  # verified layouts
    partial: bool = False  # whether a rotation of only some channels is verified

    @property
    def complex(self) -> bool:
        """Whether cos and sin are the real and the imaginary part of one table."""
        return len(self.tables) == 1

    def layout(self, q: torch.Tensor, dim: int | None) -> Layout | None:
        """Return the layout of a call, or None if that layout is not verified."""
        if self.dim is not None:
            found = Layout(q.dim(), self.default if dim is None else dim)
            return found if found in self.layouts else None
        return next((layout for layout in self.layouts if layout.rank == q.dim()), None)


def tables_of(parameters: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the parameters for cosine and sine, or for cis x = cos x + i sin x.

    A formula is identified by running the function on random tensors. The names tell which
    functions are safe to run: one that takes no angles might do anything (communicate, launch
    kernels, write). What a function computes is then verified.
    """
    words = {name: set(name.lower().split("_")) for name in parameters}

    def named(*meanings: str) -> list[str]:
        return [name for name, found in words.items() if found & set(meanings)][:1]

    cos, sin = named("cos", "cosine", "cosines"), named("sin", "sine", "sines")
    return tuple(cos + sin if cos and sin else named("cis", "ci"))


@functools.cache
def call_of(function: FunctionType) -> RotaryCall | None:
    """Return how to call `function`, if it takes one or two states, tables and options.

    The states come first, or follow the tables.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    names = [p.name for p in parameters]
    tables = sorted(tables_of(names), key=names.index)
    first = names.index(tables[0]) if tables else 0
    if not tables or names[first : first + len(tables)] != tables:
        return None
    if first:
        states, options = names[:first], parameters[first + len(tables) :]
    else:
        states = [p.name for p in parameters[len(tables) :] if p.default is p.empty]
        options = parameters[len(tables) + len(states) :]
    # A tensor has no default, or None; a parameter whose default is a number is not a tensor.
    if len(states) not in (1, 2) or any(
        p.default is not p.empty and p.default is not None
        for p in parameters
        if p.name in (*states, *tables)
    ):
        return None
    if any(p.default is p.empty for p in options):
        return None
    dim = next((p for p in options if type(p.default) is int and p.default in (1, 2)), None)
    call = RotaryCall(tuple(names), tuple(states), tables_of(names), None)
    return call if dim is None else dataclasses.replace(call, dim=dim.name, default=dim.default)
