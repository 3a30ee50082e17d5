"""Where autograd records or vectorizes the backward pass, torch computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .autograd import is_batched


def twice_differentiable(reference: Callable) -> Callable:
    """Decorate the `backward` of an autograd function whose formula there is in torch, too.

    `reference(ctx)` returns a function in differentiable torch, and the tensors that it takes:
    those that came first to `forward`, None for one that was None. With `create_graph=True` the
    gradients are those of that function, with derivatives of any order, and with
    `is_grads_batched=True` they are that function's, too; else `backward` runs.

    `torch.autograd.function.once_differentiable` raises only if an incoming gradient requires one:
    a gradient penalty would silently lack what goes through the saved tensors.
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
    """Run `function(*tensors)` and return the gradient of each tensor, None where it needs none."""
    with torch.enable_grad():
        # Aliases, so that the gradient of one does not go on through another that it came from.
        tensors = [t if t is None or not t.requires_grad else t.view_as(t) for t in tensors]
        outputs = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [None if t is None or not t.requires_grad else next(found) for t in tensors]
