"""The stock flag: `use_liger_kernel=True` of every `transformers.Trainer` uses this package.

The one global change that the package makes, and only when asked: transformers' hook for another
kernel package is redirected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import transformers.trainer
from torch import nn

from liger_trainer.injection import inject

_HOOK = "apply_liger_kernel"
_original: Callable | None = None


def enable() -> None:
    """From now on `use_liger_kernel=True` injects this package's kernels, in any stock Trainer.

    Needs no other kernel package. Calling it twice is the same as once; `disable` undoes it.
    """
    global _original
    if _original is None:
        _original = getattr(transformers.trainer, _HOOK)
        setattr(transformers.trainer, _HOOK, inject)


def disable() -> None:
    """Undoes `enable`; models that were injected stay so until `restore(model)`."""
    global _original
    if _original is not None:
        setattr(transformers.trainer, _HOOK, _original)
        _original = None


@contextlib.contextmanager
def handled_for(owner: object, apply: Callable[[], object]) -> Iterator[None]:
    """Within it, the hook calls `apply()` for `owner.model`; other models are handled as before."""
    outer = getattr(transformers.trainer, _HOOK)

    def hook(model: nn.Module, kernel_config: dict | None):
        return apply() if model is owner.model else outer(model, kernel_config)

    setattr(transformers.trainer, _HOOK, hook)
    try:
        yield
    finally:
        setattr(transformers.trainer, _HOOK, outer)
