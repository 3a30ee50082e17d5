"""Rotary position embedding: the functions that a module's forward calls on (q, k, cos, sin).

Such a function is a global of the model's source file, which every model of that architecture
shares. The global itself is not changed: the module gets its own forward, the same code with that
one name bound to the kernel (`swap.rebind`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn

from liger_trainer.injection import probe
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.kernels.layers.rope import MIN_ELEMENTS, rope, rope_reference, why_not
from liger_trainer.kernels.runtime import all_plain, is_looked_into, pays
from liger_trainer.swap import Swapped, rebind, referenced_globals


@dataclasses.dataclass(frozen=True)
class RotaryForm:
    """One formula of a rotary embedding: the options of `kernels.rope`."""

    interleaved: bool = False
    split: bool = False
    half_table: bool = False
    narrow_table: bool = False
    inverse: bool = False
    keep_dtype: bool = False

    def __str__(self) -> str:
        options = {
            "returns them apart": self.split,
            "half a table": self.half_table,
            "a table of half the width": self.narrow_table,
            "opposite angle": self.inverse,
            "cast back": self.keep_dtype,
        }
        pairs = "rotates neighbors" if self.interleaved else "rotates halves"
        return ", ".join([pairs, *(text for text, on in options.items() if on)])


_FORMS = tuple(
    RotaryForm(*lies, inverse, keep_dtype)
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
    for keep_dtype in (False, True)
)


class Layout(NamedTuple):
    """Which dimension of the states is the length, and which the heads."""

    rank: int
    heads: int

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
        return table.unsqueeze(0) if self.rank == 3 else table


HEADS_FIRST, LENGTH_FIRST = Layout(4, 1), Layout(4, 2)  # [B, H, S, D] and [B, S, H, D]
NO_BATCH = Layout(3, 1)  # [S, H, D], with tables [S, R]: the patches of all images in one row


@dataclasses.dataclass(frozen=True)
class RotaryCall:
    """How a rotary function takes q, k, cos, sin and the dimension of the heads."""

    names: tuple[str, ...]  # of all its parameters
    tensors: tuple[str, ...]  # names of q, k, cos and sin
    dim: str | None  # name of the parameter for the heads' dimension in q and k
    default: int = 1  # default of that parameter
    layouts: tuple[Layout, ...] = ()  # verified layouts
    partial: bool = False  # whether a rotation of only some channels is verified

    def layout(self, q: torch.Tensor, dim: int | None) -> Layout | None:
        """Return the layout of a call, or None if that layout is not verified."""
        if self.dim is not None:
            found = Layout(q.dim(), self.default if dim is None else dim)
            return found if found in self.layouts else None
        return next((layout for layout in self.layouts if layout.rank == q.dim()), None)


class Rotary(NamedTuple):
    """A rotary function, and how the kernel replaces it."""

    function: Callable
    call: RotaryCall
    form: RotaryForm


class FusedRotary(Swapped):
    """A module whose forward calls the kernel in place of its rotary functions."""

    @classmethod
    def namespace(cls, base: type, *rotaries: Rotary) -> dict:
        forward = base.forward
        for rotary in rotaries:
            forward = rebind(forward, rotary.function, fused_rotary(*rotary))
        return {"forward": forward}


@functools.cache
def fused_rotary(original: Callable, call: RotaryCall, form: RotaryForm) -> Callable:
    """Return a function with `original`'s signature that runs the kernel.

    It calls `original` for small inputs, for tensors that the kernel does not take, for arguments
    other than those that were verified, and in compiled code.
    """
    options = dataclasses.asdict(form)

    @functools.wraps(original)
    def apply_rotary(*args, **kwargs):
        if is_looked_into():
            return original(*args, **kwargs)
        given = {**dict(zip(call.names, args, strict=False)), **kwargs}
        tensors = [given.get(name) for name in call.tensors]
        if (
            len(given) != len(args) + len(kwargs)  # a parameter twice, or too many
            or len(given) != 4 + (call.dim in given)
            or any(tensor is None for tensor in tensors)
            or not all_plain(*tensors)
            or not pays(tensors[0], MIN_ELEMENTS)
        ):
            return original(*args, **kwargs)
        q, k, cos, sin = tensors
        layout = call.layout(q, given.get(call.dim))
        if layout is None or k.dim() != layout.rank or cos.dim() != layout.rank - 1:
            return original(*args, **kwargs)
        q, k, cos, sin = *map(layout.states, (q, k)), *map(layout.table, (cos, sin))
        rotated = cos.shape[-1] * (2 if form.narrow_table else 1)
        if why_not(q, k, cos, sin, form.narrow_table) or not (
            call.partial or rotated == q.shape[-1]
        ):
            return original(*args, **kwargs)
        return tuple(map(layout.back, rope(q, k, cos, sin, **options)))

    return apply_rotary


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose the kernel for a module whose forward calls rotary functions."""
    cls = type(module)
    functions = search.cached(("rotary functions", cls), lambda: _rotary_functions(cls))
    if not functions:
        return None
    taken = [function for function in functions if _call_of(function) is not None]
    if not taken:
        reason = f"{functions[0].__name__} takes other arguments than two states, cosine and sine"
        return Proposal.not_applicable(site, "rope", reason)
    if not search.config.rope:
        return Proposal.off(site, "rope")
    device = search.device_of(module)
    found = [
        search.cached(("rope", function, str(device)), lambda f=function: identify(f, device))
        for function in taken
    ]
    errors = [verdict.max_error for _, verdict in found]
    # Which of them a forward calls may depend on its configuration: all must be known.
    unknown = [verdict for rotary, verdict in found if rotary is None]
    if unknown:
        return Proposal.refused(site, "rope", unknown[0].reason, unknown[0].max_error)
    rotaries = [rotary for rotary, _ in found]
    forms = dict.fromkeys(str(rotary.form) for rotary in rotaries)
    swap = Swap(module, FusedRotary, tuple(rotaries))
    return Proposal.swapped(site, "rope", "; ".join(forms), swap, max_error=max(errors))


def _rotary_functions(cls: type) -> tuple[FunctionType, ...]:
    """Return the globals that `cls.forward` calls with a cosine and a sine."""
    forward = getattr(cls, "forward", None)
    if not isinstance(forward, FunctionType):
        return ()
    found = dict.fromkeys(f for f in referenced_globals(forward) if isinstance(f, FunctionType))
    return tuple(f for f in found if None not in _tables(inspect.signature(f).parameters))


def _tables(parameters: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the parameters for cosine and sine.

    A formula is identified by running the function on random tensors. The names tell which
    functions are safe to run: one that takes no angles might do anything (communicate, launch
    kernels, write). What a function computes is then verified.
    """
    words = {name: set(name.lower().split("_")) for name in parameters}
    cos = next((name for name in parameters if words[name] & {"cos", "cosine", "cosines"}), None)
    sin = next((name for name in parameters if words[name] & {"sin", "sine", "sines"}), None)
    return cos, sin


@functools.cache
def _call_of(function: FunctionType) -> RotaryCall | None:
    """Return how to call `function`, if it takes two states, cosine, sine and options."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    names = tuple(p.name for p in parameters)
    # A tensor has no default, or None; a parameter whose default is a number is not a tensor.
    candidates = [p.name for p in parameters if p.default is p.empty or p.default is None][:4]
    cos, sin = _tables(candidates)
    if cos is None or sin is None or len(candidates) != 4 or set(names[:4]) != set(candidates):
        return None
    tensors = (*(n for n in candidates if n not in (cos, sin)), cos, sin)
    options = [p for p in parameters if p.name not in tensors]
    if any(p.default is p.empty for p in options):
        return None
    dim = next((p for p in options if type(p.default) is int and p.default in (1, 2)), None)
    if dim is None:
        return RotaryCall(names, tensors, None)
    return RotaryCall(names, tensors, dim.name, dim.default)


def identify(function: Callable, device: torch.device) -> tuple[Rotary | None, probe.Verdict]:
    """Return how the kernel replaces `function`: in one form, and in every layout that it takes."""
    call = _call_of(function)
    assert call is not None
    layouts = [HEADS_FIRST, LENGTH_FIRST, *([NO_BATCH] if call.dim is None else [])]
    layouts.sort(key=lambda layout: layout.heads != call.default)
    verdicts = []
    for layout in layouts:
        form, verdict = _form_in(function, call, layout, device)
        if form is not None:
            equal = [
                other
                for other in layouts
                if other == layout or _equal(function, call, form, other, device)
            ]
            widths = {c.inputs[2].shape[-1] for c in _cases(function, call, layout, device)}
            call = dataclasses.replace(call, layouts=tuple(equal), partial=len(widths) == 2)
            return Rotary(function, call, form), verdict
        verdicts.append(verdict)
    # One of a layout that it takes says more than that it does not take the others.
    return None, next((v for v in verdicts if v.max_error is not None), verdicts[0])


def _form_in(function, call, layout, device) -> tuple[RotaryForm | None, probe.Verdict]:
    """Return the form that equals `function`, for full and (if supported) partial rotation."""
    original, cases = _original(function, call, layout), _cases(function, call, layout, device)
    # First in plain torch: on a GPU, every form of the kernel would have to be compiled.
    likely = [
        form
        for form in _FORMS
        if probe.compare(original, _candidate(form, layout, rope_reference), cases[:1]).equal
    ]
    candidates = {form: _candidate(form, layout) for form in likely or _FORMS[:1]}
    otherwise = "no known form of rotary embedding"
    return probe.choose(original, candidates, lambda: cases, otherwise)


def _equal(function, call, form, layout, device) -> bool:
    cases = _cases(function, call, layout, device)
    original, candidate = _original(function, call, layout), _candidate(form, layout)
    return probe.compare(original, candidate, cases).equal


def _original(function: Callable, call: RotaryCall, layout: Layout) -> Callable:
    option = {} if call.dim is None else {call.dim: layout.heads}
    return lambda *tensors: function(**dict(zip(call.tensors, tensors, strict=True)), **option)


def _candidate(form: RotaryForm, layout: Layout, kernel: Callable = rope) -> Callable:
    def rotate(q, k, cos, sin):
        tensors = *map(layout.states, (q, k)), *map(layout.table, (cos, sin))
        if (problem := why_not(*tensors, form.narrow_table)) is not None:
            raise ValueError(problem)
        return tuple(map(layout.back, kernel(*tensors, **dataclasses.asdict(form))))

    return rotate


_WIDTH = 16


def _cases(
    function: Callable, call: RotaryCall, layout: Layout, device: torch.device
) -> list[probe.Case]:
    """Return grouped heads, a table per sample or for all, columns that differ in both halves.

    The table is as wide as a head, or half as wide (for a part of its channels, or with an entry
    for each pair), as far as `function` takes that.
    """
    dtypes = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
    shapes = [(2, 5, 2), (2, 1, 1), (3, 33, 1)]  # batch, length, tables
    by_width = [
        [
            _case(device, shape, layout, width, scale, dtype, table_dtype)
            for dtype, table_dtype in dtypes
            for scale, shape in zip(probe.SCALES, shapes, strict=True)
        ]
        for width in (_WIDTH, _WIDTH // 2)
    ]
    original = _original(function, call, layout)
    taken = [cases for cases in by_width if _takes(original, cases[0])]
    return [case for cases in taken or by_width[:1] for case in cases]


def _takes(function: Callable, case: probe.Case) -> bool:
    try:
        function(*case.inputs)
    except Exception:  # anyone's function may say in any words that shapes do not fit
        return False
    return True


def _case(device, shape, layout, table_width, scale, dtype, table_dtype) -> probe.Case:
    batch, length, tables = shape if layout.rank == 4 else (1, shape[1], 1)
    q, k = (probe.draw((batch, length, n, _WIDTH), scale, device, n).to(dtype) for n in (4, 2))
    cos, sin = (
        probe.draw((tables, length, table_width), 1.0, device, 7 + i).to(table_dtype)
        for i in range(2)
    )
    if layout == HEADS_FIRST:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    elif layout == NO_BATCH:
        q, k, cos, sin = (t.squeeze(0) for t in (q, k, cos, sin))
    label = f"{dtype} states of size {scale:g}, {table_dtype} table"
    return probe.Case((q.requires_grad_(), k.requires_grad_(), cos, sin), label)
