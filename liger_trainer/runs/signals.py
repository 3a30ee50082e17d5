"""Stop a run on Ctrl-C or SIGTERM without losing anything."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from liger_trainer.runs.engine import in_any_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, end training after the current step, with a checkpoint.

    A second signal interrupts at once, except that a save is finished first; a third one interrupts
    that, too. If several processes train, all stop after the same step. `stopped` is True once
    they have agreed to.
    """

    def __init__(self):
        self.stopped = False
        self._count = 0
        self._saving = False
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

    def saving(self, begins: bool) -> None:
        """Record that a save begins (True) or has ended (False)."""
        self._saving = begins

    def interrupt_evaluation(self, args) -> None:
        """Raise KeyboardInterrupt from the first signal on, because everything is saved.

        The processes agree here, and after each batch of an evaluation.
        """
        self._saved = True
        if in_any_process(self.signaled, args):
            raise KeyboardInterrupt

    @property
    def signaled(self) -> bool:
        """Whether this process has received a signal."""
        return self._count > 0

    def _handle(self, number, frame):
        self._count += 1
        if self._count > 2 or (self._count == 2 and not self._saving):
            raise KeyboardInterrupt
        message = "Saving; once more to stop without it."
        if self._count == 1:
            message = "Stopping after this step; once more to stop at once."
        if self._saved:
            message = "Stopping the evaluation; once more to stop at once."
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine tells
            print(f"\n{message}", file=sys.stderr, flush=True)

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
