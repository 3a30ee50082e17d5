"""Errors of runs, how they are printed, and the exit codes. A leaf.

Wrong input raises ValueError or OSError instead.
"""

from __future__ import annotations

import sys
import traceback

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


class RunError(RuntimeError):
    """Training failed; the message states why, and where to continue."""


class Reported(Exception):  # noqa: N818 (it is not an error itself)
    """The run has failed; this process or another one has printed why. `code` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def report(error: BaseException, *, debug: bool) -> int:
    """Print an error, with its traceback if it is unexpected or with `debug`; return the exit code.

    A message of KeyboardInterrupt is printed in place of the usual one.
    """
    code = exit_code(error)
    is_expected = code == WRONG_INPUT or isinstance(error, RunError) or _is_lost_connection(error)
    if code == INTERRUPTED:
        usual = "Interrupted: nothing was begun that could be lost."
        print(f"\n{str(error) or usual}", file=sys.stderr)
    elif debug or not is_expected:
        traceback.print_exception(error)
    if is_expected:
        print(f"error: {' '.join(reason(error).split())}", file=sys.stderr)
    sys.stderr.flush()
    return code


def reason(error: BaseException) -> str:
    """Return the message of an error, and of a lost connection what it means."""
    if _is_lost_connection(error):
        return "another process of the run has ended"
    return str(error)


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether gloo lost a process. (NCCL waits for it, until the launcher ends the wait.)"""
    return type(error) is RuntimeError and "gloo/transport" in str(error)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that raised `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return WRONG_INPUT if isinstance(error, (ValueError, OSError)) else FAILED
