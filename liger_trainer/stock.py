"""The stock flag: `use_liger_kernel=True` uses this package in every Trainer, including TRL's.

This is the only global change that the package makes, and only on request. transformers' hook for
another kernel package is redirected. TRL's trainers become the classes of `liger_trainer.trl` if
the flag in their arguments is on. If the flag is off, Trainer restores a model that an earlier
trainer injected.
"""

from __future__ import annotations

import functools
import importlib.util

from transformers import Trainer

from liger_trainer import trainer_hook, trl
from liger_trainer.injection.walk import inject, restore_for
from liger_trainer.request import config_of

_original: trainer_hook.Hook | None = None


def enable() -> None:
    """Make `use_liger_kernel=True` inject this package's kernels in every stock Trainer.

    Needs no other kernel package. Further calls have no effect; `disable` undoes it.
    """
    global _original
    if _original is None:
        _original = trainer_hook.current()
        trainer_hook.replace(inject)
        for name, around in _WRAPPERS.items():
            setattr(Trainer, name, around(_PLAIN[name]))
        if importlib.util.find_spec("trl") is not None:
            trl.patch_classes()


def disable() -> None:
    """Undo `enable`; injected models stay injected until `restore(model)`."""
    global _original
    if _original is not None:
        trainer_hook.replace(_original)
        _original = None
        for name, method in _PLAIN.items():
            setattr(Trainer, name, method)
        if importlib.util.find_spec("trl") is not None:
            trl.unpatch_classes()


def _without_skip_logits(compute_loss):
    @functools.wraps(compute_loss)
    def run(self, model, inputs, *args, **kwargs):
        if "skip_logits" in inputs and config_of(self) is not None:
            inputs = trainer_hook.without_skip_logits(inputs)  # the model may not accept it
        return compute_loss(self, model, inputs, *args, **kwargs)

    return run


def _restoring(method):
    """Return `method`, which first restores the model if the trainer's flag is off."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        if config_of(self) is None:
            restore_for(self.model, self)
        return method(self, *args, **kwargs)

    return run


_WRAPPERS = {
    "train": _restoring,
    "evaluation_loop": _restoring,
    "compute_loss": _without_skip_logits,
}
_PLAIN = {name: getattr(Trainer, name) for name in _WRAPPERS}
