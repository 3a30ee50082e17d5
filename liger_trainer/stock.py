"""The stock flag: `use_liger_kernel=True` of every Trainer, also of TRL's, uses this package.

The one global change that the package makes, and only when asked: transformers' hook for another
kernel package is redirected, and TRL's trainers become the classes of `liger_trainer.trl` where
their arguments have the flag on.
"""

from __future__ import annotations

import importlib.util

from liger_trainer import trainer_hook, trl
from liger_trainer.injection.walk import inject

_original: trainer_hook.Hook | None = None


def enable() -> None:
    """From now on `use_liger_kernel=True` injects this package's kernels, in any stock Trainer.

    Needs no other kernel package. Calling it twice is the same as once; `disable` undoes it.
    """
    global _original
    if _original is None:
        _original = trainer_hook.current()
        trainer_hook.replace(inject)
        if importlib.util.find_spec("trl") is not None:
            trl.redirect()


def disable() -> None:
    """Undoes `enable`; models that were injected stay so until `restore(model)`."""
    global _original
    if _original is not None:
        trainer_hook.replace(_original)
        _original = None
        if importlib.util.find_spec("trl") is not None:
            trl.undo_redirect()
