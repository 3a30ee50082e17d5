"""Functions that run as they are under torch.compile: deferred logits pass through them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def uncompiled(function: Callable, recursive: bool = True) -> Callable:
    """Keep `function` out of compiled graphs; with `recursive` what it calls, too."""
    reason = (
        "liger_trainer defers logits here; for one full graph set fused_linear_cross_entropy "
        "to false in liger_kernel_config"
    )
    disabled = torch.compiler.disable(function, recursive=recursive, reason=reason)

    @functools.wraps(function)
    def call(*args, **kwargs):
        exporting = torch.compiler.is_exporting()  # there all of the graph is wanted
        return (function if exporting else disabled)(*args, **kwargs)

    _skip_frames_of(call)
    if not recursive:
        _skip_frames_of(function)
    return call


def _skip_frames_of(function: Callable) -> None:
    """Spare dynamo the attempt to compile the function's frames, which takes 0.5 ms a call.

    `torch.compiler.disable(recursive=False)` covers only the wrapper that it returns: the function
    inside is looked at anew, and given up, in every call.
    """
    import torch._dynamo.eval_frame  # slow to import, and by now `disable` has

    skip_code = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)


def uncompiled_result(getter: Callable) -> Callable:
    """Return a getter of a property whose value, a function, runs uncompiled."""
    disabled = uncompiled(lambda self: uncompiled(getter(self)))
    return lambda self: (getter if torch.compiler.is_exporting() else disabled)(self)
