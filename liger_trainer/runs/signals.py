"""Stop a run on Ctrl-C or SIGTERM without losing anything."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from liger_trainer.runs.engine import in_any_process, is_first_on_machine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EvaluationInterrupted(Exception):  # noqa: N818 (it is not an error)
    """All processes have agreed to end the evaluation of a trained and saved model."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, end training after the current step, with a checkpoint.

    A second signal interrupts at once, except that a save is finished first; a third one interrupts
    that, too. If several processes train, all stop after the same step. `stopped` is True once
    they have agreed to. KeyboardInterrupt, which a second signal raises, comes to each process at
    its own place: nothing may follow it that the processes do together.
    """

    def __init__(self):
        self.stopped = False
        self._count = 0
        self._saving = False
        self._saves_model = False
        self._saved = False

    @contextmanager
    def watching(self) -> Iterator[StopOnSignal]:
        """Handle both signals within the block. Python allows that only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def saving(self, begins: bool, *, model: bool = False) -> None:
        """Record that a save, of a checkpoint or the trained model, begins (True) or has ended."""
        self._saving, self._saves_model = begins, model

    def interrupt_evaluation(self, args) -> None:
        """Raise EvaluationInterrupted from the first signal on, because everything is saved.

        The processes agree here, and after each batch of an evaluation.
        """
        self._saved = True
        if in_any_process(self.signaled, args):
            raise EvaluationInterrupted

    @property
    def signaled(self) -> bool:
        """Whether this process has received a signal."""
        return self._count > 0

    def _handle(self, number, frame):
        self._count += 1
        if self._count > 2 or (self._count == 2 and not self._saving):
            raise KeyboardInterrupt
        if is_first_on_machine():
            print(f"\n{self._answer()}", file=sys.stderr, flush=True)

    def _answer(self) -> str:
        """Return what the signal just received leads to, and what another one would."""
        if self._saved:
            return "Stopping the evaluation; once more to stop at once."
        if self._count > 1:
            return "Saving; once more to stop without it."
        if self._saves_model:
            return "Stopping when the model is saved."
        return "Stopping after this step; once more to stop at once."

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._saved:
            self.interrupt_evaluation(args)

    def on_step_end(self, args, state, control, **kwargs):
        # A signal may come while the processes agree: it counts after the next step, in all.
        if in_any_process(self.signaled, args) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_log = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control


def shield_workers(trainer) -> None:
    """Keep signals from the processes that load batches: the current step still needs theirs.

    Terminals and torchrun send a signal to a whole process group, so each gets a group of its own.
    """
    for name in ("get_train_dataloader", "get_eval_dataloader"):
        setattr(trainer, name, _shielded(getattr(trainer, name)))


def _shielded(loader_of: Callable) -> Callable:
    @functools.wraps(loader_of)
    def wrapper(*args, **kwargs):
        loader = loader_of(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's loaders are wrappers
        inner.worker_init_fn = functools.partial(_in_own_group, inner.worker_init_fn)
        return loader

    return wrapper


def _in_own_group(init: Callable | None, worker: int) -> None:
    os.setpgrp()
    if init is not None:
        init(worker)
