"""Where autograd records or vectorizes the backward pass, torch computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .autograd import is_batched


def twice_differentiable(reference: Callable) -> Callable:
    """Decorate the `backward` of an autograd function that also has a reference in torch.

    `reference(ctx)` returns a function in differentiable torch and its arguments: the leading
    tensors of `forward`, with None for one that was None. With `create_graph=True`, that function
    is differentiated, to any order, and with `is_grads_batched=True` as well; otherwise `backward`
    runs.

    `torch.autograd.function.once_differentiable` would raise only if an incoming gradient requires
    a gradient, so a gradient penalty would silently lack the part through the saved tensors.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            recorded = torch.is_grad_enabled()
            if torch.compiler.is_compiling() or not (recorded or any(map(is_batched, grads))):
                return backward(ctx, *grads)
            found = gradients(*reference(ctx), grads, create_graph=recorded)
            return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

        return wrapper

    return decorate


def gradients(
    function: Callable, tensors: Sequence[torch.Tensor | None], grads, create_graph: bool
) -> list[torch.Tensor | None]:
    """Run `function(*tensors)`; return each tensor's gradient, or None if it requires none."""
    with torch.enable_grad():
        # Aliases, so that no gradient flows through one tensor into another that it came from.
        tensors = [t if t is None or not t.requires_grad else t.view_as(t) for t in tensors]
        outputs = function(*tensors)
    if isinstance(outputs, tuple):  # one that depends on no tensor that requires a gradient is left
        pairs = zip(outputs, grads, strict=True)
        outputs, grads = zip(*((y, g) for y, g in pairs if y.requires_grad), strict=True)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [None if t is None or not t.requires_grad else next(found) for t in tensors]
