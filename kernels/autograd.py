"""Helpers shared by the autograd functions of all kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the `backward` of an autograd function that cannot be differentiated itself.

    Like `torch.autograd.function.once_differentiable`, but with `create_graph=True` the gradients
    always carry a node that raises. torch's own raises only if an incoming gradient requires one,
    so the second derivative of a plain `loss.backward(create_graph=True)` would silently lack the
    part that goes through the saved tensors.

    The node lies between the gradients and the tensors that they depend on: saved tensors, and
    those passed to `depends_on`. So `torch.autograd.grad`, which runs only the nodes that lead to
    its inputs, reaches it too.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        compiling = torch.compiler.is_compiling()
        if not compiling and any(map(is_batched, grads)):
            raise RuntimeError(
                "liger_trainer's kernels take one gradient at a time. For is_grads_batched=True "
                "(a jacobian with vectorize=True), set use_liger_kernel=False or call "
                "restore(model)."
            )
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if compiling:
            return found
        found = found if isinstance(found, tuple) else (found,)
        return forbid_derivative(found, (*ctx.saved_tensors, *grads, link_of(ctx)))

    return wrapper


_LINK = "_liger_link"


def depends_on(ctx, *tensors: torch.Tensor | None) -> None:
    """Record in forward that the gradients depend on `tensors`, which are not saved.

    Only their place in the graph is kept.
    """
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if wanted and not torch.compiler.is_compiling():
        with torch.enable_grad():
            setattr(ctx, _LINK, Anchor.apply(*wanted))


def link_of(ctx) -> torch.Tensor | None:
    """Return what `depends_on` noted: a tensor that depends on the same."""
    return getattr(ctx, _LINK, None)


def is_batched(grad: torch.Tensor | None) -> bool:
    """Whether it stands for many gradients at once (`is_grads_batched=True`)."""
    return isinstance(grad, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(grad)


def forbid_derivative(grads: tuple, operands: Iterable[torch.Tensor | None]) -> tuple:
    """Return `grads` such that, with `create_graph=True`, differentiating them raises.

    `operands` are the tensors that the gradients depend on.
    """
    present = [g for g in grads if g is not None]
    if not present or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    anchor = torch.zeros(0, requires_grad=True)  # makes the outputs require a gradient
    anchors = [anchor, *(t for t in operands if t is not None and t.requires_grad)]
    marked = iter(_NoDerivative.apply(len(anchors), *anchors, *present))
    return tuple(None if g is None else next(marked) for g in grads)


class Anchor(torch.autograd.Function):
    """Return one element that depends on `tensors` in the graph, but sends them no gradient."""

    @staticmethod
    def forward(ctx, *tensors):
        return torch.zeros(1, dtype=tensors[0].dtype, device=tensors[0].device)

    @staticmethod
    def backward(ctx, _):
        return (None,) * len(ctx.needs_input_grad)


class _NoDerivative(torch.autograd.Function):
    """Return the gradients unchanged; the backward of this function raises."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(g.view_as(g) for g in tensors[count:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "liger_trainer's kernels have no second derivative. For a gradient penalty or a "
            "Hessian-vector product, train with use_liger_kernel=False or call restore(model)."
        )
