"""Rotary position embedding: the function that a module's forward calls on (q, k, cos, sin).

The function is a global of the model's source file, which every model of that architecture shares.
So not the global is changed: the module gets its own forward, the same code with that one name
bound to the kernel (`swap.rebind`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
from torch import nn

from liger_trainer import probe
from liger_trainer.kernels.rope import MIN_ELEMENTS, rope
from liger_trainer.kernels.runtime import pays
from liger_trainer.report import Row
from liger_trainer.rules.finding import SWITCHED_OFF, Finding, Search
from liger_trainer.swap import Swapped, rebind, referenced_globals


@dataclasses.dataclass(frozen=True)
class RotaryForm:
    """The options of `kernels.rope`."""

    interleaved: bool = False
    half_table: bool = False
    inverse: bool = False
    keep_dtype: bool = False


_FORMS = tuple(
    RotaryForm(interleaved, half_table, inverse, keep_dtype)
    for interleaved, half_table in ((False, False), (True, False), (True, True))
    for inverse in (False, True)
    for keep_dtype in (False, True)
)


class FusedRotary(Swapped):
    """Keeps the module's forward, with its rotary function replaced by the kernel."""

    @classmethod
    def namespace(cls, base: type, function: Callable, form: RotaryForm) -> dict[str, object]:
        return {"forward": rebind(base.forward, function, fused_rotary(function, form))}


@functools.cache
def fused_rotary(original: Callable, form: RotaryForm) -> Callable:
    """A function with `original`'s signature that runs the kernel.

    It calls `original` for inputs that are too small for the kernel to pay, and for arguments other
    than q, k, cos, sin and the heads' dimension.
    """
    options = dataclasses.asdict(form)

    @functools.wraps(original)
    def apply_rotary(q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
        usual = not (args or kwargs) and unsqueeze_dim in (1, 2) and q.dim() == 4 == cos.dim() + 1
        if not (usual and pays(q, MIN_ELEMENTS)):
            return original(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)
        if unsqueeze_dim == 1:
            return rope(q, k, cos, sin, **options)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, **options)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary


def examine(search: Search, site: str, module: nn.Module) -> Finding | None:
    function = _rotary_function(type(module))
    if function is None:
        return None
    if not search.config.rope:
        return Finding(Row(site, "rope", False, SWITCHED_OFF, eligible=False))
    device = search.device_of(module)
    form, verdict = search.once(("rope", function, str(device)), lambda: identify(function, device))
    if form is None:
        return Finding(Row(site, "rope", False, verdict.reason, verdict.max_error))
    row = Row(site, "rope", True, describe(form), verdict.max_error)
    return Finding(row, module, FusedRotary, (function, form))


def describe(form: RotaryForm) -> str:
    pairs = "neighbours" if form.interleaved else "halves"
    extra = [
        text
        for text, on in (
            ("half a table", form.half_table),
            ("opposite angle", form.inverse),
            ("cast back", form.keep_dtype),
        )
        if on
    ]
    return ", ".join([f"rotates {pairs}", *extra])


@functools.cache
def _rotary_function(cls: type) -> Callable | None:
    """The global that `cls.forward` calls and whose parameters start with q, k, cos, sin."""
    forward = getattr(cls, "forward", None)
    if not isinstance(forward, FunctionType):
        return None
    for candidate in referenced_globals(forward):
        if isinstance(candidate, FunctionType):
            names = list(inspect.signature(candidate).parameters)
            if names[:4] == ["q", "k", "cos", "sin"]:
                return candidate
    return None


def identify(function: Callable, device: torch.device) -> tuple[RotaryForm | None, probe.Verdict]:
    """The form that equals `function`, for full and, where it takes that, partial rotation."""
    partial = _accepts_partial(function, device)
    found, nearest = [], None
    for form in _FORMS:
        candidate = functools.partial(rope, **dataclasses.asdict(form))
        verdict = probe.compare(
            lambda q, k, cos, sin: function(q, k, cos, sin), candidate, _cases(device, partial)
        )
        if verdict.equal:
            found.append((form, verdict))
        elif nearest is None or (verdict.max_error or 9e9) < (nearest.max_error or 9e9):
            nearest = verdict
    if found:
        return min(found, key=lambda pair: pair[1].rounding)
    reason = nearest.reason if nearest.max_error is None else "no known form of rotary embedding"
    return None, dataclasses.replace(nearest, reason=reason)


def _accepts_partial(function: Callable, device: torch.device) -> bool:
    case = next(_cases(device, partial=True, only_partial=True))
    try:
        function(*case.inputs)
    except (RuntimeError, ValueError, IndexError):  # shapes that do not broadcast
        return False
    return True


def _cases(device: torch.device, partial: bool, only_partial: bool = False) -> Iterator[probe.Case]:
    """Grouped heads, a table per sample, table columns that differ in both halves."""
    batch, heads, kv_heads, length, width = 2, 4, 2, 5, 16
    widths = [width // 2] if only_partial else [width, width // 2] if partial else [width]
    dtypes = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
    for rotated in widths:
        for dtype, table_dtype in dtypes:
            for scale in probe.SCALES:
                q, k = (
                    probe.draw((batch, length, n, width), scale, device, n).to(dtype)
                    for n in (heads, kv_heads)
                )
                cos, sin = (
                    probe.draw((batch, length, rotated), 1.0, device, 7 + i).to(table_dtype)
                    for i in range(2)
                )
                q, k = (t.transpose(1, 2).requires_grad_() for t in (q, k))
                label = f"{dtype} states of size {scale:g}, {table_dtype} table"
                yield probe.Case((q, k, cos, sin), label)
