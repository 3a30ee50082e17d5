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
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not differentiable:
            return found
        found = found if isinstance(found, tuple) else (found,)
        marked = iter(_NoDerivative.apply(_anchor(), *(g for g in found if g is not None)))
        return tuple(None if g is None else next(marked) for g in found)

    return wrapper


def _anchor() -> torch.Tensor:
    """An input that makes the outputs of an autograd function require a gradient."""
    return torch.zeros(0, requires_grad=True)


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
