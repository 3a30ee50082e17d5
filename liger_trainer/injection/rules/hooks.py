"""Who hooked a module: an engine, whose hooks run around a deferred call, or somebody else."""

from __future__ import annotations

import functools

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


def _is_an_engines(hook: object) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', '')}.".startswith(_ENGINES)
