"""Report an error of a run on several processes once, and end all of them with its exit code.

Processes fail together, over wrong input; or one after the other, because they lose the connection
to the one that failed. Either way the first one has the reason. The launcher ends all others as
soon as one has exited, so none exits before the reason is printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch

from liger_trainer.runs.engine import is_first_on_machine, leave_group
from liger_trainer.runs.errors import FAILED, Reported, RunError, exit_code, report

_PATIENCE = 5.0  # seconds for another process to print its error
_MOMENT = 1.0  # seconds in which the launcher, or another process, tells of a process that ended


@contextlib.contextmanager
def ending_together(*, debug: bool) -> Iterator[None]:
    """Run the block, which is the whole run of this process, and leave the process group.

    SIGTERM interrupts it as Ctrl-C does. If there are several processes, they wait for each other
    at its end; an error is printed by the first that raises one, and `Reported` is raised in all.
    """
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with _interrupted_by_sigterm():
        failed = True
        try:
            yield
            if together and torch.distributed.is_initialized():
                torch.distributed.barrier()  # the first process may still be writing its report
            failed = False
        except BaseException as error:
            if not together:
                raise
            raise Reported(_reported(error, debug, ended=_sigterm_noted())) from error
        finally:
            if together:
                _sigterm_noted()
            leave_group(failed=failed)


def _reported(error: BaseException, debug: bool, ended: threading.Event) -> int:
    """Print `error`, unless another process has printed one; return the exit code of the first.

    `ended` is set when the launcher tells this process to end.
    """
    try:
        store = _store()
        if store is not None:
            return _first_reported(store, error, debug, ended)
    except torch.distributed.DistError:
        pass  # the process that hosted the store has ended
    if is_first_on_machine():
        return report(error, debug=debug)
    return exit_code(error)


def _first_reported(
    store: torch.distributed.Store, error: BaseException, debug: bool, ended: threading.Event
) -> int:
    key = f"liger_trainer/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # It may be the lost connection to a process that has failed, or was killed, of which the
    # launcher tells; it then ends this process, too.
    may_be_lost = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    if may_be_lost and not _wait_for(store, key, _MOMENT, ended) and ended.is_set():
        return FAILED
    if store.add(f"{key}/count", 1) == 1:
        code = report(error, debug=debug)
        store.set(key, str(code))
        return code
    printed = _wait_for(store, key, _PATIENCE, threading.Event())
    return int(store.get(key)) if printed else exit_code(error)


def _store() -> torch.distributed.Store | None:
    """Return the key-value store that all processes share, or None if there is none.

    torchrun hosts one; otherwise the first process does, from when the process group exists.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if "MASTER_PORT" not in os.environ or not (hosted or torch.distributed.is_initialized()):
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=_PATIENCE), wait_for_workers=False
    )


def _wait_for(
    store: torch.distributed.Store, key: str, seconds: float, ended: threading.Event
) -> bool:
    """Wait until `store` has `key`, some seconds have passed, or `ended` is set; return whether it
    has."""
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end or ended.wait(0.02):
            return store.check([key])
    return True


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
            signal.signal(signal.SIGTERM, previous)


def _sigterm_noted() -> threading.Event:
    """Make SIGTERM set an event, which is returned, and do nothing else: this process is ending."""
    noted = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: noted.set())
    return noted
