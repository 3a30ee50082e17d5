"""Rotary position embedding: the functions that a module's forward calls with cosine and sine.

Most rotate queries and keys in one call, (q, k, cos, sin); some take one of them, (x, cos, sin),
and some a table of complex numbers, cos + i sin (Llama 4, DeepSeek V2).

Such a function is a global of the model's source file, which every model of that architecture
shares. The global itself is not changed: the module gets its own forward, the same code with that
one name bound to the kernel (`swap.rebind`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn

from liger_trainer.injection import probe
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.injection.rules.rotary_forms import (
    FORMS,
    HEADS_FIRST,
    LENGTH_FIRST,
    NO_BATCH,
    ONE_TABLE,
    Layout,
    RotaryCall,
    RotaryForm,
    call_of,
    tables_of,
)
from liger_trainer.kernels.layers.rope import MIN_ELEMENTS, rope, rope_reference, why_not
from liger_trainer.kernels.runtime import all_plain, is_looked_into, pays
from liger_trainer.source import rebind, referenced_globals
from liger_trainer.swap import Swapped, while_current


class Rotary(NamedTuple):
    """A rotary function, and how the kernel replaces it."""

    function: FunctionType
    call: RotaryCall
    form: RotaryForm


class FusedRotary(Swapped):
    """A module whose forward calls the kernel in place of its rotary functions.

    Key: each of these, and the function through which forward calls it, or None.
    """

    @classmethod
    def namespace(cls, base: type, *calls: tuple[Rotary, FunctionType | None]) -> dict:
        forward = base.forward
        for rotary, caller in calls:
            old, new = rotary.function, fused_rotary(*rotary)
            if caller is not None:
                old, new = caller, rebind(caller, old, new)
            forward = rebind(forward, old, new)
        return {"forward": while_current(base, forward)}


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
        tensors = [given.get(name) for name in (*call.states, *call.tables)]
        if (
            len(given) != len(args) + len(kwargs)  # a parameter twice, or too many
            or len(given) != len(tensors) + (call.dim in given)
            or any(tensor is None for tensor in tensors)
            or not all_plain(*tensors)
            or not pays(tensors[0], MIN_ELEMENTS)
            or tensors[-1].is_complex() != call.complex
        ):
            return original(*args, **kwargs)
        if call.complex:
            tensors[-1:] = torch.view_as_real(tensors[-1].resolve_conj()).unbind(-1)
        *states, cos, sin = tensors
        layout = call.layout(states[0], given.get(call.dim))
        if (
            layout is None
            or any(x.dim() != layout.rank for x in states)
            or cos.dim() != layout.rank - 1
        ):
            return original(*args, **kwargs)
        placed = _placed(states, cos, sin, layout)
        whole = form.rotated(cos) == states[0].shape[-1]
        if why_not(*placed, form.narrow_table) or not (call.partial or whole):
            return original(*args, **kwargs)
        rotated = [layout.back(x) for x in rope(*placed, **options)]
        return tuple(rotated) if len(states) == 2 else rotated[0]

    return apply_rotary


def _placed(
    states: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, ...]:
    """Return q, k, cos and sin as `kernels.rope` takes them; for one state, k has no heads."""
    q = layout.states(states[0])
    k = layout.states(states[1]) if len(states) == 2 else q.detach()[:, :0]
    return q, k, layout.table(cos), layout.table(sin)


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose the kernel for a module whose forward calls rotary functions."""
    cls = type(module)
    functions = search.cached(("rotary functions", cls), lambda: _rotary_functions(cls))
    if not functions:
        return None
    taken = {
        function: caller for function, caller in functions.items() if call_of(function) is not None
    }
    if not taken:
        name = next(iter(functions)).__name__
        reason = f"{name} takes other arguments than one or two states, cosine and sine"
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
    swap = Swap(module, FusedRotary, tuple(zip(rotaries, taken.values(), strict=True)))
    return Proposal.swapped(site, "rope", "; ".join(forms), swap, max_error=max(errors))


def _rotary_functions(cls: type) -> dict[FunctionType, FunctionType | None]:
    """Return the functions with a cosine and a sine that `cls.forward` calls.

    If one takes other arguments than a rotary function, but calls such a function (for each axis of
    an image, say), that is returned in its place, with the one that calls it; else with None.
    """
    forward = getattr(cls, "forward", None)
    if not isinstance(forward, FunctionType):
        return {}
    found = {}
    for function in _called_with_angles(forward):
        inner = [] if call_of(function) else list(filter(call_of, _called_with_angles(function)))
        found |= dict.fromkeys(inner, function) if inner else {function: None}
    return found


def _called_with_angles(function: FunctionType) -> list[FunctionType]:
    called = dict.fromkeys(f for f in referenced_globals(function) if isinstance(f, FunctionType))
    parameters = {f: inspect.signature(f).parameters for f in called}
    return [f for f, p in parameters.items() if 0 < len(tables_of(p)) < len(p)]


def identify(function: Callable, device: torch.device) -> tuple[Rotary | None, probe.Verdict]:
    """Return how the kernel replaces `function`: in one form, and in every layout that it takes."""
    call = call_of(function)
    assert call is not None
    layouts = [HEADS_FIRST, LENGTH_FIRST, *([NO_BATCH, ONE_TABLE] if call.dim is None else [])]
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
            cases = _cases(function, call, layout, device)
            partial = any(form.rotated(case.inputs[-1]) < _WIDTH for case in cases)
            call = dataclasses.replace(call, layouts=tuple(equal), partial=partial)
            return Rotary(function, call, form), verdict
        verdicts.append(verdict)
    # One of a layout that it takes says more than that it does not take the others.
    taken = next((v for v in verdicts if v.max_error is not None), None)
    if taken is not None:
        return None, taken
    reason = f"{function.__name__} takes no known layout of heads ({verdicts[0].reason})"
    return None, dataclasses.replace(verdicts[0], reason=reason)


def _form_in(function, call, layout, device) -> tuple[RotaryForm | None, probe.Verdict]:
    """Return the form that equals `function`, for full and (if supported) partial rotation."""
    original, cases = _original(function, call, layout), _cases(function, call, layout, device)
    # First in plain torch: on a GPU, every form of the kernel would have to be compiled.
    first = list({case.inputs[-1].shape[-1]: case for case in reversed(cases)}.values())
    likely = []
    for form in FORMS:
        # Which channels are rotated shows only where some are not.
        partial = any(form.rotated(case.inputs[-1]) < _WIDTH for case in first)
        candidate = _candidate(form, layout, rope_reference)
        if (partial or not form.trailing) and probe.compare(original, candidate, first).equal:
            likely.append(form)
    candidates = {form: _candidate(form, layout) for form in likely or FORMS[:1]}
    otherwise = "no known form of rotary embedding"
    return probe.choose(original, candidates, lambda: cases, otherwise)


def _equal(function, call, form, layout, device) -> bool:
    cases = _cases(function, call, layout, device)
    original, candidate = _original(function, call, layout), _candidate(form, layout)
    return probe.compare(original, candidate, cases).equal


def _original(function: Callable, call: RotaryCall, layout: Layout) -> Callable:
    option = {} if call.dim is None else {call.dim: layout.heads}
    states = len(call.states)

    def rotate(*tensors):
        tables = [torch.complex(*tensors[-2:])] if call.complex else tensors[-2:]
        given = zip((*call.states, *call.tables), (*tensors[:-2], *tables), strict=True)
        found = function(**dict(given), **option)
        if not isinstance(found, torch.Tensor if states == 1 else tuple):
            raise TypeError(f"returns a {type(found).__name__} for {states} states")
        return found

    return rotate


def _candidate(form: RotaryForm, layout: Layout, kernel: Callable = rope) -> Callable:
    def rotate(*tensors):
        *states, cos, sin = tensors
        placed = _placed(states, cos, sin, layout)
        if (problem := why_not(*placed, form.narrow_table)) is not None:
            raise ValueError(problem)
        rotated = kernel(*placed, **dataclasses.asdict(form))
        return tuple(map(layout.back, rotated[: len(states)]))

    return rotate


_WIDTH = 16


def _cases(
    function: Callable, call: RotaryCall, layout: Layout, device: torch.device
) -> list[probe.Case]:
    """Return grouped heads, a table per sample or for all, columns that differ in both halves.

    The table is as wide as a head, or a half or a quarter of that (for a part of its channels, or
    with an entry for each pair), as far as `function` takes that.
    """
    dtypes = [(torch.float32,) * 2, (torch.bfloat16, torch.float32)]
    if not call.complex:  # complex numbers have at least 32 bits in each part
        dtypes.append((torch.bfloat16,) * 2)
    shapes = [(2, 5, 2), (2, 1, 1), (3, 33, 1)]  # batch, length, tables
    by_width = [
        [
            _case(call, device, shape, layout, width, scale, dtype, table_dtype)
            for dtype, table_dtype in dtypes
            for scale, shape in zip(probe.SCALES, shapes, strict=True)
        ]
        for width in (_WIDTH, _WIDTH // 2, _WIDTH // 4)
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


def _case(call, device, shape, layout, table_width, scale, dtype, table_dtype) -> probe.Case:
    batch, length, tables = shape if layout.rank == 4 else (1, shape[1], 1)
    if layout.one_table:
        tables = 1
    heads = (4, 2)[: len(call.states)]
    states = [probe.draw((batch, length, n, _WIDTH), scale, device, n).to(dtype) for n in heads]
    angles = [
        probe.draw((tables, length, table_width), 1.0, device, 7 + i).to(table_dtype)
        for i in range(2)
    ]
    if layout == HEADS_FIRST:
        states = [x.transpose(1, 2) for x in states]
    elif layout.one_table:
        angles = [t.transpose(0, 1) for t in angles]
    elif layout == NO_BATCH:
        states, angles = ([t.squeeze(0) for t in tensors] for tensors in (states, angles))
    label = f"{dtype} states of size {scale:g}, {table_dtype} table"
    return probe.Case((*(x.requires_grad_() for x in states), *angles), label)
