"""Who hooked a module, and how to compute where an engine's hooks have gathered weights.

An engine's hooks are run around a call of the module, whatever that call computes; anybody else's
want to see or change what the module's own forward takes and returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules import module as _global_hooks

_ENGINES = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.integrations.")


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a forward hook is on `module`, or on every module, that is not an engine's.

    An engine's hooks gather, move and free weights, so they run where the weights are read: around
    the deferred call, which returns no logits. A hook that wants to see or change the logits must
    run where they are returned instead. The two kinds lie in the same tables and have the same
    signature, and either may read, replace or ignore what it is given, so neither the place nor a
    trial run tells them apart: who wrote a hook is the only sign. An engine that is not in the list
    costs no more than speed: its hooks leave the head plain, with a row in the report.
    """
    tables = (
        module._forward_hooks,
        module._forward_pre_hooks,
        _global_hooks._global_forward_hooks,
        _global_hooks._global_forward_pre_hooks,
    )
    return any(not _is_an_engines(hook) for table in tables for hook in table.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a backward hook is on `module`, or on every module one that is not an engine's."""
    tables = (_global_hooks._global_backward_hooks, _global_hooks._global_backward_pre_hooks)
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or any(not _is_an_engines(hook) for table in tables for hook in table.values())
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward (engines gather, offload, observe)."""
    own = vars(module)  # looking four names up by attribute would take three times as long
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _global_hooks._global_forward_hooks
        or _global_hooks._global_forward_pre_hooks
        or _global_hooks._global_backward_hooks
        or _global_hooks._global_backward_pre_hooks
    )


def only_gathered(modules: Iterable[nn.Module], bystander: nn.Module) -> bool:
    """Whether the hooks on `modules` are an engine's, and the same as those on `bystander`.

    `bystander` holds no weights: what is put on it as well cannot depend on what a module computes.
    Hooks that do (those of tensor parallelism reduce what a split layer returns) are not the same.
    """
    everywhere = set(map(_written_as, _forward_hooks(bystander)))
    return all(
        everywhere.issuperset(map(_written_as, _forward_hooks(module)))
        and "forward" not in vars(module)
        and not foreign_hooks(module)
        and not has_backward_hooks(module)
        for module in modules
    )


def call_nested(
    modules: Sequence[nn.Module], x: torch.Tensor, body: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Call `modules` with `x`, one inside the other, and `body` in place of the innermost forward.

    Whatever their hooks gather is there while `body` runs. What they register on inputs and outputs
    gathers it again before the backward of all that `body` did, and frees it after that.
    """
    if not modules:
        return body(x)
    outer, *inner = modules
    own = vars(outer)
    own["forward"] = lambda x: call_nested(inner, x, body)
    try:
        return outer(x)
    finally:
        del own["forward"]


def _forward_hooks(module: nn.Module) -> Iterator[Callable]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _written_as(hook: Callable) -> tuple[str, str]:
    """Where the code of a hook is: one definition makes a function for each module."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return getattr(hook, "__module__", ""), name


def _is_an_engines(hook: Callable) -> bool:
    return f"{_written_as(hook)[0]}.".startswith(_ENGINES)
