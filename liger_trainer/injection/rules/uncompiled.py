"""Keep functions that deferred logits pass through out of torch.compile's graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def uncompiled(function: Callable, recursive: bool = True) -> Callable:
    """Keep `function` out of compiled graphs; with `recursive`, also all that it calls."""
    reason = (
        "liger_trainer defers logits here; for one full graph set fused_linear_cross_entropy "
        "to false in liger_kernel_config"
    )
    disabled = torch.compiler.disable(function, recursive=recursive, reason=reason)

    @functools.wraps(function)
    def call(*args, **kwargs):
        exporting = torch.compiler.is_exporting()  # an export must contain the whole graph
        return (function if exporting else disabled)(*args, **kwargs)

    _skip_frames_of(call)
    if not recursive:
        _skip_frames_of(function)
    return call


def _skip_frames_of(function: Callable) -> None:
    """Make dynamo skip the function's frames; its attempts to compile them take 0.5 ms per call.

    `torch.compiler.disable(recursive=False)` covers only the wrapper that it returns. Dynamo tries
    to compile the function inside, and gives up, in every call.
    """
    import torch._dynamo.eval_frame  # slow to import, but `disable` has already done so

    skip_code = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)


def uncompiled_result(getter: Callable) -> Callable:
    """Return a property getter whose value, a function, runs uncompiled."""
    disabled = uncompiled(lambda self: uncompiled(getter(self)))
    return lambda self: (getter if torch.compiler.is_exporting() else disabled)(self)
