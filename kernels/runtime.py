"""Helpers shared by all kernels: when Triton runs, op registration, tensors viewed as rows.

Nothing here is particular to an operation. Each kernel file imports `triton`, `tl` from here, so
that it can be imported where Triton is absent (the torch reference then runs).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Windows, macOS: every function runs on its torch reference

    class _Absent:
        """Stands in for `triton` and `tl` in decorators and annotations."""

        def __getattr__(self, name):
            return self

        def __call__(self, fn=None, *args, **kwargs):
            return self if fn is None else fn

    triton = tl = _Absent()
    HAS_TRITON = False

_interpret_on_cpu = False
# A context variable, so that another thread that trains at the same time is not affected.
_every_size = ContextVar("every_size", default=False)
_warned_no_triton = False


@contextlib.contextmanager
def every_size() -> Iterator[None]:
    """Run kernels even below the size at which they win; used by the probe and by tests."""
    token = _every_size.set(True)
    try:
        yield
    finally:
        _every_size.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors of every size, in the whole process; used by tests.

    Needs `TRITON_INTERPRET=1` at import.
    """
    global _interpret_on_cpu
    before, _interpret_on_cpu = _interpret_on_cpu, True
    try:
        with every_size():
            yield
    finally:
        _interpret_on_cpu = before


def pays(x: torch.Tensor, elements: int) -> bool:
    """Return True if `x` has enough elements for the kernel to beat PyTorch.

    With fewer elements, launching from Python takes longer than PyTorch's own kernels take to run.
    Compiled code launches without Python, so it always gets the kernel.
    """
    return x.numel() >= elements or torch.compiler.is_compiling() or _every_size.get()


def is_transformed() -> bool:
    """Return whether `torch.func` or forward-mode differentiation transforms what runs.

    They transform torch's own operations, one by one, so kernels must not run.
    """
    return not torch.compiler.is_compiling() and _is_transformed()


def is_looked_into() -> bool:
    """Return whether what runs is compiled or transformed, so that swapped modules run plain."""
    return torch.compiler.is_compiling() or _is_transformed()


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def use_triton(x: torch.Tensor) -> bool:
    """Return whether a Triton kernel handles `x`; otherwise, the torch reference does."""
    if is_transformed():
        return False
    if not x.is_cuda:
        return _interpret_on_cpu
    if not HAS_TRITON:
        _warn_no_triton()
    return HAS_TRITON


def _warn_no_triton() -> None:
    global _warned_no_triton
    if not _warned_no_triton:
        _warned_no_triton = True
        logger.warning(
            "Triton is not installed: liger_trainer runs on its torch path, which is correct but "
            "not faster than plain transformers. Install it with `pip install triton`."
        )


_HERE = contextlib.nullcontext()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the device of `tensor` is the current one, as Triton needs it."""
    return torch.cuda.device(tensor.device) if _is_elsewhere(tensor) else _HERE


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which autocast changes no dtype on the device of `tensor`."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _HERE


def call_on_device(tensor: torch.Tensor, function: Callable, *args):
    """Return `function(*args)`, called with the device of `tensor` as the current one."""
    if _is_elsewhere(tensor):
        with torch.cuda.device(tensor.device):
            return function(*args)
    return function(*args)


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.device.index != torch.cuda.current_device()


_LIBRARY = torch.library.Library("liger_trainer", "DEF")


def register_op(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Register `launch` as `torch.ops.liger_trainer.<name>` and return a function that calls it.

    Args:
        schema: torch schema, such as `"swiglu_fwd(Tensor gate, Tensor up) -> Tensor"`.
        launch: runs the kernel; called under the device of its first tensor.
        fake: returns empty outputs of the right shapes, dtypes and strides (for torch.compile).

    The op is opaque to autograd; a `torch.autograd.Function` in the same file calls it.
    torch.compile gets the op. Eager code calls `launch` directly, which saves the dispatcher's 6 us
    per call.
    """
    name = schema.split("(", 1)[0]

    def launch_on_device(first, *args):
        tensor = first[0] if isinstance(first, (list, tuple)) else first
        return call_on_device(tensor, launch, first, *args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch_on_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liger_trainer::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.liger_trainer, name).default

    def call(first, *args):
        if torch.compiler.is_compiling() or type(first) not in PLAIN:
            return op(first, *args)
        return launch_on_device(first, *args)

    call.op = op
    return call


PLAIN = (torch.Tensor, torch.nn.Parameter)  # subclasses (fake tensors) need the dispatcher


def all_plain(*tensors: torch.Tensor | None) -> bool:
    """Return whether no tensor is of a subclass (such as DTensor), which kernels do not support."""
    return all(t is None or type(t) in PLAIN for t in tensors)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., H] as [rows, H] with unit stride in H: a view if possible, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


# Triton's own functions of these names also work on the host, but take 2 us per call there.


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()


def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; a small one for the interpreter on a CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_sizes(vocab: int, largest: tuple[int, int]) -> dict[str, int]:
    """Return BLOCK and num_warps of a kernel over rows of logits; at most `largest`."""
    columns, warps = largest
    block = min(columns, max(16, next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, warps * block // columns)}


def runs_in_triton(logits: torch.Tensor) -> bool:
    """Return whether the kernels over rows of logits take `logits`; fp64 uses the torch path."""
    supported = logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return supported and use_triton(logits)
