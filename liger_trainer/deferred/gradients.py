"""torch functions that request gradients of deferred logits: hooks, and `autograd.grad`."""

from __future__ import annotations

import weakref

import torch

from liger_trainer.deferred.handlers import implements
from liger_trainer.deferred.tensor import Deferred, as_wrapper

_Tensor = torch.Tensor


def _separate_value(logits) -> torch.Tensor | None:
    """Return the value of the logits if its gradients do not pass through the logits themselves."""
    direct = getattr(logits, "_direct", None)
    return direct if direct is not None and direct is logits._value else None


@implements(_Tensor.register_hook)
def _register_hook(logits, hook):
    value = _separate_value(logits)
    if value is not None and value.requires_grad:
        value.register_hook(hook)
    return as_wrapper(_Tensor.register_hook, logits, hook)


@implements(_Tensor.retain_grad)
def _retain_grad(logits):
    value = _separate_value(logits)
    if value is not None and value.requires_grad:
        value.retain_grad()
    if not logits.requires_grad:
        raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    if logits._retains_grad:
        return
    # torch's own would keep a deferred gradient, which holds the logits: a reference cycle through
    # C++ objects, which Python's collector does not see.
    logits._retains_grad, owner = True, weakref.ref(logits)

    def keep(grad):
        if (alive := owner()) is not None:
            grad = grad.materialize() if isinstance(grad, Deferred) else grad.clone()
            before = alive._retained
            alive._retained = grad if before is None else before + grad

    as_wrapper(_Tensor.register_hook, logits, keep)


@implements(_Tensor.retains_grad.__get__)
def _retains_grad(logits, *owner):
    return logits._retains_grad


@implements(_Tensor.grad.__get__)
def _grad(logits, *owner):
    value = _separate_value(logits)
    parts = [logits._retained]
    parts.append(value.grad if value is not None and value.retains_grad else None)
    return _sum([p for p in parts if p is not None])


def _sum(parts):
    plain = [p.materialize() if isinstance(p, Deferred) else p for p in parts]
    return sum(plain[1:], plain[0]) if plain else None


@implements(torch.autograd.grad)
def _autograd_grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False,
                   only_inputs=True, allow_unused=None, is_grads_batched=False,
                   materialize_grads=False):  # fmt: skip
    """Return gradients; for deferred logits, the sum of what reached them and their value."""
    wanted = [inputs] if torch.is_tensor(inputs) else list(inputs)
    sources: list[list] = []  # for each input, where its gradients arrive
    for x in wanted:
        if isinstance(x, Deferred):
            sources.append([torch.autograd.graph.get_gradient_edge(x)])
            value = _separate_value(x)
            sources[-1] += [value] if value is not None and value.requires_grad else []
        else:
            sources.append([x])
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    found = iter(
        torch.autograd.grad(
            [x.materialize() if isinstance(x, Deferred) else x for x in outputs],
            [x for parts in sources for x in parts],
            grad_outputs=grad_outputs,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )
    )
    grads = []
    for parts in sources:
        arrived = [next(found) for _ in parts]
        grads.append(_sum([g for g in arrived if g is not None]))
    if materialize_grads:
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)
        ]
    elif not allow_unused and any(g is None for g in grads):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return tuple(grads)
