"""Who hooked a module: an engine, whose hooks run around a deferred call, or somebody else."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules import module as _global_hooks

# They gather, move and free weights. Others want to see or change what the module returns.
_ENGINES = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.integrations.")


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a forward hook is on `module`, or on every module, that is not an engine's."""
    tables = (
        module._forward_hooks,
        module._forward_pre_hooks,
        _global_hooks._global_forward_hooks,
        _global_hooks._global_forward_pre_hooks,
    )
    return any(not _is_an_engines(hook) for table in tables for hook in table.values())


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a backward hook is on `module`, or on every module."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or _global_hooks._global_backward_hooks
        or _global_hooks._global_backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward (engines gather, offload, observe)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or _global_hooks._global_forward_hooks
        or _global_hooks._global_forward_pre_hooks
        or has_backward_hooks(module)
        or "forward" in vars(module)
    )


def _is_an_engines(hook: object) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', '')}.".startswith(_ENGINES)
