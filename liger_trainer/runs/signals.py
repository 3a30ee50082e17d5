"""Stopping a run with Ctrl-C or SIGTERM so that nothing is lost."""

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
    """Ctrl-C or SIGTERM ends training after the current step, with a checkpoint.

    A second one interrupts at once, but for a save, which ends first; a third one interrupts that
    too. Where several processes train, all stop after the same step. `stopping` tells that training
    was asked to end.
    """

    def __init__(self):
        self.stopping = False
        self._count = 0
        self._saving = False
        self._at_once = False

    @contextmanager
    def watching(self) -> Iterator[StopOnSignal]:
        """Handle both signals within the block. Python allows that in the main thread only."""
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
        """Tells that a save begins or has ended."""
        self._saving = begins

    def interrupt_at_once(self) -> None:
        """From now on a signal interrupts what runs: everything worth keeping is saved."""
        if self.stopping:
            raise KeyboardInterrupt
        self._at_once = True

    def _handle(self, number, frame):
        self._count += 1
        self.stopping = True
        if self._at_once or self._count > 2 or (self._count == 2 and not self._saving):
            raise KeyboardInterrupt
        told = "Saving; once more to stop without it."
        if self._count == 1:
            told = "Stopping after this step; once more to stop at once."
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine tells
            print(f"\n{told}", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = in_any_process(self.stopping, args)
        if self.stopping and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control
