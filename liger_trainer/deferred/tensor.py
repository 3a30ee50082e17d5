"""Tensors that are not computed yet.

A `Deferred` stands for the result of an operation, with the right shape, strides, dtype and device.
A subclass intercepts the few functions that it implements without the value (`handlers`); every
other use computes the value once and keeps it. So code that knows nothing about deferral sees an
ordinary tensor.

Autograd. A deferred tensor has a `grad_fn` of its own, which sends a gradient that arrives at it to
its operands; an intercepted function bypasses it. Gradients are complete on either path.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from liger_trainer.kernels.autograd import first_derivative_only

_Tensor = torch.Tensor

# These functions read the wrapper's own shape, dtype and device.
_METADATA = {
    *(getattr(_Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn",
        "is_mps", "is_xpu", "itemsize", "nbytes", "_version", "output_nr", "retains_grad", "_base",
        "_backward_hooks",
    )),
    _Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.nelement, _Tensor.element_size,
    _Tensor.is_floating_point, torch.is_floating_point, _Tensor.is_complex, torch.is_complex,
    _Tensor.get_device, _Tensor.__len__, _Tensor.__hash__, _Tensor.is_contiguous, _Tensor.stride,
    _Tensor.ndimension, torch.numel, _Tensor.register_hook, _Tensor.is_inference,
    _Tensor.is_signed, torch.is_signed,
}  # fmt: skip


class Deferred(torch.Tensor):
    """Base class; a subclass defines `compute` and fills `handlers`."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _value: torch.Tensor | None = None

    @staticmethod
    def __new__(cls, shape, dtype, device, strides=None, storage_offset=None):
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides, storage_offset, dtype=dtype, device=device
        )
        # C++ code that reads the memory, which does not exist, gets an error, not a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def compute(self) -> torch.Tensor:
        """Return the value, connected to the operands' autograd graph."""
        raise NotImplementedError

    def materialize(self) -> torch.Tensor:
        """Return the value, as an ordinary tensor connected to the operands' autograd graph."""
        value = self._value
        if value is None:
            # The grad mode of creation counts, not that of materialization.
            with torch.set_grad_enabled(self.grad_fn is not None):
                value = self.compute()
            if self.requires_grad and not value.requires_grad:
                # Created under no_grad inside another autograd function, which is its grad_fn.
                value = _ValueOf.apply(self, value)
            self._value = value
        return value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        func = _original_function(func)
        handler = cls.handlers.get(func)
        if handler is not None:
            answer = _call(handler, args, kwargs)
            if answer is not NotImplemented:
                return answer
        if func in _METADATA:
            return as_wrapper(func, *args, **kwargs)
        args, kwargs = tree_map_only(
            Deferred, lambda d: d.materialize(), (tuple(args), dict(kwargs))
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Serve C++ code that skips `__torch_function__`, below autograd."""
        with torch.no_grad():
            args, kwargs = tree_map_only(
                Deferred, lambda d: d.detached_value(), (tuple(args), dict(kwargs or {}))
            )
            return func(*args, **kwargs)

    def detached_value(self) -> torch.Tensor:
        """Return the value without its graph, for calls below autograd; does not keep it."""
        return self.compute() if self._value is None else self._value.detach()

    def __deepcopy__(self, memo):
        return self.materialize().__deepcopy__(memo)

    def __reduce_ex__(self, protocol):
        return self.materialize().__reduce_ex__(protocol)


_FUNCTIONAL = {name: f for name, f in vars(F).items() if inspect.isfunction(f)}
_ORIGINAL = frozenset(_FUNCTIONAL.values())


def _original_function(func: Callable) -> Callable:
    """Return torch's own function for `func`, which may be a wrapper around it.

    `F.cross_entropy` passes whatever its own name is bound to. If that is a wrapper that someone
    has put in its place, calling it would apply the wrapper a second time.
    """
    if func in _ORIGINAL or not inspect.isfunction(func):
        return func
    return next((f for name, f in _FUNCTIONAL.items() if vars(F).get(name) is func), func)


def as_wrapper(func: Callable, *args, **kwargs):
    """Apply `func` to deferred tensors themselves, not to their values."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class _Signature(NamedTuple):
    names: frozenset[str]
    positional: float
    any_keyword: bool


@functools.cache
def _signature(handler: Callable) -> _Signature:
    parameters = inspect.signature(handler).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
    kinds = [p.kind for p in parameters]
    positional = sum(kind.name.startswith("POSITIONAL") for kind in kinds)
    any_number = inspect.Parameter.VAR_POSITIONAL in kinds
    any_keyword = inspect.Parameter.VAR_KEYWORD in kinds
    return _Signature(names, float("inf") if any_number else positional, any_keyword)


_SYNONYMS = {"axis": "dim", "keepdims": "keepdim"}


def _call(handler: Callable, args: tuple, kwargs: dict):
    """Return the handler's result, or NotImplemented if it does not take these arguments."""
    signature = _signature(handler)
    if kwargs:
        kwargs = {_SYNONYMS.get(name, name): value for name, value in kwargs.items()}
        if "input" in kwargs and "input" not in signature.names:
            args = (kwargs.pop("input"), *args)
        if not (signature.any_keyword or kwargs.keys() <= signature.names):
            return NotImplemented
    if not args or len(args) > signature.positional:
        return NotImplemented
    return handler(*args, **kwargs)


class _ValueOf(torch.autograd.Function):
    """Return the value of a deferred tensor, whose gradient goes to that tensor's own grad_fn."""

    @staticmethod
    def forward(ctx, deferred, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Attach(torch.autograd.Function):
    """Connect a deferred tensor to the autograd graph.

    In `Attach.apply(make, recompute, *operands)`, `make()` returns the deferred tensor and
    `recompute(*operands)` returns its value. If a gradient reaches the deferred tensor itself,
    backward differentiates `recompute` and sends it to the operands.
    """

    @staticmethod
    def forward(ctx, make, recompute, *operands):
        ctx.set_materialize_grads(False)
        ctx.recompute = recompute
        ctx.save_for_backward(*operands)
        return make()

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if isinstance(grad, Deferred):
            grad = grad.materialize()
        wanted = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            value = ctx.recompute(*wanted)
        inputs = [t for t in wanted if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(value, inputs, grad))
        return (
            None,
            None,
            *(next(grads) if t is not None and t.requires_grad else None for t in wanted),
        )
