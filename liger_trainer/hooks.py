"""Tell whose hooks are on a module, and run code where an engine's hooks have gathered weights.

An engine's hooks run around a call of the module, whatever the call computes. Any other hook is
meant to read or change what the module's own forward takes and returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules import module as _global_hooks

_ENGINES = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.integrations.")


def foreign_hooks(module: nn.Module) -> bool:
    """Return whether a forward hook that is not an engine's is on `module` or registered globally.

    An engine's hooks gather, move and free weights, so they run where the weights are read: around
    the deferred call, which returns no logits. A hook that reads or changes the logits must run
    where they are returned instead. Both kinds are registered in the same tables with the same
    signature, and either may read, replace or ignore its arguments, so only the module that defines
    a hook tells them apart. An engine missing from the list costs only speed: the head then stays
    plain, with a row in the report.
    """
    tables = (
        module._forward_hooks,
        module._forward_pre_hooks,
        _global_hooks._global_forward_hooks,
        _global_hooks._global_forward_pre_hooks,
    )
    return any(not _is_engine_hook(hook) for table in tables for hook in table.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether `module` has a backward hook, or a global one exists that is no engine's."""
    tables = (_global_hooks._global_backward_hooks, _global_hooks._global_backward_pre_hooks)
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or any(not _is_engine_hook(hook) for table in tables for hook in table.values())
    )


def is_hooked(*modules: nn.Module) -> bool:
    """Return whether calling one of `modules` does more than its forward (gather, observe)."""
    for module in modules:
        own = vars(module)  # attribute access to the four tables would take three times as long
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return bool(
        _global_hooks._global_forward_hooks
        or _global_hooks._global_forward_pre_hooks
        or _global_hooks._global_backward_hooks
        or _global_hooks._global_backward_pre_hooks
    )


def only_gathered(modules: Iterable[nn.Module], bystander: nn.Module) -> bool:
    """Return whether the hooks on `modules` are an engine's, and are also on `bystander`.

    `bystander` holds no weights, so hooks that are also on it cannot depend on what a module
    computes. Hooks that do depend on it (tensor parallelism reduces the output of a split layer)
    are not on it.
    """
    everywhere = set(map(_definition_of, _forward_hooks(bystander)))
    return all(
        everywhere.issuperset(map(_definition_of, _forward_hooks(module)))
        and "forward" not in vars(module)
        and not foreign_hooks(module)
        and not has_backward_hooks(module)
        for module in modules
    )


def call_nested(
    modules: Sequence[nn.Module], x: torch.Tensor, body: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Call `modules` with `x`, one inside the other, and `body` in place of the innermost forward.

    The weights that their hooks gather are available while `body` runs. The hooks that these
    register on inputs and outputs gather the weights again before the backward of `body`, and free
    them afterwards.
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


def _definition_of(hook: Callable) -> tuple[str, str]:
    """Return module and name of the code that defines a hook, which may be a closure per module."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    return getattr(hook, "__module__", ""), name


def _is_engine_hook(hook: Callable) -> bool:
    return f"{_definition_of(hook)[0]}.".startswith(_ENGINES)
