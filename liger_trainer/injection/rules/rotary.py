"""Rotary position embedding: the function that a module's forward calls on (q, k, cos, sin).

The function is a global of the model's source file, which every model of that architecture shares.
The global itself is not changed: the module gets its own forward, the same code with that one name
bound to the kernel (`swap.rebind`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType

import torch
from torch import nn

from liger_trainer.injection import probe
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.kernels.layers.rope import MIN_ELEMENTS, rope, why_not
from liger_trainer.kernels.runtime import all_plain, is_looked_into, pays
from liger_trainer.swap import Swapped, rebind, referenced_globals


@dataclasses.dataclass(frozen=True)
class RotaryForm:
    """The options of `kernels.rope`."""

    interleaved: bool = False
    half_table: bool = False
    inverse: bool = False
    keep_dtype: bool = False

    def __str__(self) -> str:
        options = {
            "half a table": self.half_table,
            "opposite angle": self.inverse,
            "cast back": self.keep_dtype,
        }
        pairs = "rotates neighbors" if self.interleaved else "rotates halves"
        return ", ".join([pairs, *(text for text, on in options.items() if on)])


_FORMS = tuple(
    RotaryForm(interleaved, half_table, inverse, keep_dtype)
    for interleaved, half_table in ((False, False), (True, False), (True, True))
    for inverse in (False, True)
    for keep_dtype in (False, True)
)


@dataclasses.dataclass(frozen=True)
class RotaryCall:
    """How a rotary function takes q, k, cos and sin, and the dimension of the heads."""

    names: tuple[str, ...]  # of all its parameters
    tensors: tuple[str, ...]  # those of q, k, cos and sin
    dim: str | None  # that of the dimension that the heads have in q and k
    dims: tuple[int, ...] = (1,)  # values of it for which equality is proven, its default first


class FusedRotary(Swapped):
    """Keeps the module's forward, with its rotary function replaced by the kernel."""

    @classmethod
    def namespace(cls, base: type, function: Callable, call: RotaryCall, form: RotaryForm) -> dict:
        return {"forward": rebind(base.forward, function, fused_rotary(function, call, form))}


@functools.cache
def fused_rotary(original: Callable, call: RotaryCall, form: RotaryForm) -> Callable:
    """Return a function with `original`'s signature that runs the kernel.

    It calls `original` for inputs that are too small for the kernel to pay, for tensors that the
    kernel does not take, for arguments other than those that the kernel was proven with, and in
    compiled code.
    """
    options = dataclasses.asdict(form)

    @functools.wraps(original)
    def apply_rotary(*args, **kwargs):
        if is_looked_into():
            return original(*args, **kwargs)
        given = {**dict(zip(call.names, args, strict=False)), **kwargs}
        q, k, cos, sin = map(given.get, call.tensors)
        heads = given.get(call.dim, call.dims[0])
        if (
            len(given) != len(args) + len(kwargs)  # a parameter twice, or too many
            or len(given) != 4 + (call.dim in given)
            or heads not in call.dims
            or q is None
            or k is None
            or cos is None
            or sin is None
            or not all_plain(q, k, cos, sin)
            or not pays(q, MIN_ELEMENTS)
        ):
            return original(*args, **kwargs)
        if heads == 2 and q.dim() == k.dim() == 4:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if why_not(q, k, cos, sin) is not None:
            return original(*args, **kwargs)
        q, k = rope(q, k, cos, sin, **options)
        return (q, k) if heads == 1 else (q.transpose(1, 2), k.transpose(1, 2))

    return apply_rotary


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    cls = type(module)
    function = search.cached(("rotary function", cls), lambda: _rotary_function(cls))
    if function is None:
        return None
    if _call_of(function) is None:
        reason = f"{function.__name__} takes other arguments than two states, cosine and sine"
        return Proposal.not_applicable(site, "rope", reason)
    if not search.config.rope:
        return Proposal.off(site, "rope")
    device = search.device_of(module)
    form, verdict = search.cached(
        ("rope", function, str(device)), lambda: identify(function, device)
    )
    if form is None:
        return Proposal.refused(site, "rope", verdict.reason, verdict.max_error)
    call = search.cached(
        ("rope call", function, str(device)), lambda: proven_call(function, form, device)
    )
    swap = Swap(module, FusedRotary, (function, call, form))
    return Proposal.swapped(site, "rope", str(form), swap, max_error=verdict.max_error)


def _rotary_function(cls: type) -> Callable | None:
    """Return the global that `cls.forward` calls with a cosine and a sine.

    If there are several, the first that takes two states with them.
    """
    forward = getattr(cls, "forward", None)
    if not isinstance(forward, FunctionType):
        return None
    functions = [
        f
        for f in referenced_globals(forward)
        if isinstance(f, FunctionType) and None not in _tables(inspect.signature(f).parameters)
    ]
    return next((f for f in functions if _call_of(f) is not None), next(iter(functions), None))


def _tables(parameters: Iterable[str]) -> tuple[str | None, str | None]:
    """Return which of the parameters are called cosine and sine.

    A function can only be found by running it. Their names say which ones may be run: one that
    takes no angles might do anything with random tensors (communicate, launch kernels, write).
    What it computes with them, and where else it may be called, is proven.
    """
    words = {name: set(name.lower().split("_")) for name in parameters}
    cos = next((name for name in parameters if words[name] & {"cos", "cosine", "cosines"}), None)
    sin = next((name for name in parameters if words[name] & {"sin", "sine", "sines"}), None)
    return cos, sin


@functools.cache
def _call_of(function: FunctionType) -> RotaryCall | None:
    """How `function` is called, if it is a function of (two states, cosine, sine, options)."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    names = tuple(p.name for p in parameters)
    # A tensor may be left out (None); what has a number for default is none.
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
    return RotaryCall(names, tensors, dim.name, (dim.default,))


def identify(function: Callable, device: torch.device) -> tuple[RotaryForm | None, probe.Verdict]:
    """Return the form that equals `function`, for full and, if it takes that, partial rotation."""
    call = _call_of(function)
    assert call is not None
    heads = call.dims[0]
    cases = _cases(device, heads, _accepts_partial(function, call, device))
    candidates = {form: _candidate(form, heads) for form in _FORMS}
    otherwise = "no known form of rotary embedding"
    return probe.choose(_original(function, call, heads), candidates, lambda: cases, otherwise)


def proven_call(function: Callable, form: RotaryForm, device: torch.device) -> RotaryCall:
    """How `function` may be called where it equals `form`: with which dimension of the heads."""
    call = _call_of(function)
    assert call is not None
    if call.dim is None:
        return call
    other = 3 - call.dims[0]
    cases = [c for c in _cases(device, other, False) if c.inputs[2].dtype == torch.float32]
    equal = probe.compare(_original(function, call, other), _candidate(form, other), cases).equal
    return dataclasses.replace(call, dims=(*call.dims, other) if equal else call.dims)


def _original(function: Callable, call: RotaryCall, heads: int) -> Callable:
    option = {} if call.dim is None else {call.dim: heads}
    return lambda *tensors: function(**dict(zip(call.tensors, tensors, strict=True)), **option)


def _candidate(form: RotaryForm, heads: int) -> Callable:
    def rotate(q, k, cos, sin):
        q, k = (t if heads == 1 else t.transpose(1, 2) for t in (q, k))
        rotated = rope(q, k, cos, sin, **dataclasses.asdict(form))
        return rotated if heads == 1 else tuple(t.transpose(1, 2) for t in rotated)

    return rotate


def _accepts_partial(function: Callable, call: RotaryCall, device: torch.device) -> bool:
    *_, partial = _cases(device, call.dims[0], partial=True)
    try:
        _original(function, call, call.dims[0])(*partial.inputs)
    except (RuntimeError, ValueError, IndexError):  # shapes that do not broadcast
        return False
    return True


def _cases(device: torch.device, heads: int, partial: bool) -> list[probe.Case]:
    """Return grouped heads, a table per sample or for all, columns that differ in both halves."""
    width = 16
    widths = [width, width // 2] if partial else [width]
    dtypes = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
    shapes = [(2, 5, 2), (2, 1, 1), (3, 33, 1)]  # batch, length, tables
    return [
        _case(device, shape, heads, width, rotated, scale, dtype, table_dtype)
        for rotated in widths
        for dtype, table_dtype in dtypes
        for scale, shape in zip(probe.SCALES, shapes, strict=True)
    ]


def _case(device, shape, heads, width, rotated, scale, dtype, table_dtype) -> probe.Case:
    batch, length, tables = shape
    q, k = (probe.draw((batch, length, n, width), scale, device, n).to(dtype) for n in (4, 2))
    cos, sin = (
        probe.draw((tables, length, rotated), 1.0, device, 7 + i).to(table_dtype) for i in range(2)
    )
    q, k = (t.transpose(1, 2) if heads == 1 else t for t in (q, k))
    label = f"{dtype} states of size {scale:g}, {table_dtype} table"
    return probe.Case((q.requires_grad_(), k.requires_grad_(), cos, sin), label)
