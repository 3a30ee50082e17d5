"""Runs untrusted Python in a process of its own, under limits of time, memory and files.

It protects a training run from endless loops, runaway memory and early exits of generated code. It
is not a jail: the code has the rights of the user, could start processes and reach the network.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

MIB = 1024**2

# What the child runs. The program arrives on stdin, so that it is in no argument list, and what it
# reports must carry the secret: `exit(0)` in the program is then no success.
_CHILD = """
import os, sys
seconds, memory, secret = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":  # which refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except ImportError:  # not a POSIX system: the wall clock alone limits
    pass
report, source = os.dup(1), sys.stdin.read()
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
del sys.argv[1:]
scope = {"__name__": "__main__"}
try:
    exec(compile(source, "<program>", "exec"), scope)
    said = "passed " + str(scope.get("RESULT", ""))
except BaseException as error:
    said = "raised " + type(error).__name__
os.write(report, (secret + " " + said).encode())
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `error` is None where it ran to its end, else the name of the exception, or `timeout` (also for
    a process that was killed at a limit, or that left early). `result` is the text of its variable
    `RESULT`.
    """

    error: str | None
    result: str = ""

    @property
    def passed(self) -> bool:
        return self.error is None


def run_program(source: str, *, seconds: int = 4, memory_mib: int = 1024) -> Outcome:
    """Runs `source` in an isolated interpreter and tells how it ended.

    `seconds` limit the processor time, and, times five, the wall clock: a busy machine must not
    change the outcome. The program's output is dropped, and it cannot write to files.
    """
    secret = secrets.token_hex(16)
    limits = [str(seconds), str(memory_mib * MIB), secret]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(source.encode(), timeout=5 * seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            _kill(process)
    first, _, rest = said.decode(errors="replace").partition(" ")
    if first != secret:
        return Outcome("timeout")
    kind, _, detail = rest.partition(" ")
    return Outcome(None, detail) if kind == "passed" else Outcome(detail)


def run_programs(sources: Iterable[str], **limits: int) -> list[Outcome]:
    """`run_program` of each, as many at a time as there are processors, in the given order."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: run_program(source, **limits), sources))


def _kill(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()
