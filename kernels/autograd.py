"""What the autograd functions of all kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the `backward` of an autograd function that cannot be differentiated itself.

    Like `torch.autograd.function.once_differentiable`, but with `create_graph=True` the gradients
    always carry a node that raises. torch's own raises only if an incoming gradient requires one,
    so the second derivative of a plain `loss.backward(create_graph=True)` would silently lack the
    part that goes through the saved tensors.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if not torch.compiler.is_compiling() and any(map(_is_batched, grads)):
            raise RuntimeError(
                "liger_trainer's kernels take one gradient at a time. For is_grads_batched=True "
                "(a jacobian with vectorize=True), set use_liger_kernel=False or call "
                "restore(model)."
            )
        with torch.no_grad():
            found = backward(ctx, *grads)
        return forbid_derivative(found if isinstance(found, tuple) else (found,))

    return wrapper


def _is_batched(grad) -> bool:
    return isinstance(grad, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(grad)


def forbid_derivative(grads: tuple) -> tuple:
    """Return gradients whose own derivative raises, if `create_graph=True` asks for one."""
    present = [g for g in grads if g is not None]
    if not present or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    anchor = torch.zeros(0, requires_grad=True)  # makes the outputs require a gradient
    marked = iter(_NoDerivative.apply(anchor, *present))
    return tuple(None if g is None else next(marked) for g in grads)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "liger_trainer's kernels have no second derivative. For a gradient penalty or a "
            "Hessian-vector product, train with use_liger_kernel=False or call restore(model)."
        )
