"""Check untrusted programs against tests, in processes that cannot touch the run.

    this process ── job ──> checking process <── calls, plain data ──> candidate's process
                 <─ verdict ─

The candidate's process has its own user, process, network, IPC and mount namespaces, a read-only
file system that holds only the interpreter, no environment, and limits on processor time, memory,
files and processes. The checking processes are in a sandbox of their own, because tests are code,
too. Kinds of sandboxes, in order of preference:

| bubblewrap | the program `bwrap` |
| namespaces | Linux system calls, if users may create namespaces |
| process | only limits. Unsafe: the code has the user's rights, but cannot forge the verdict |
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from liger_trainer.runs.rewards.judge import limits, wire

SANDBOXES = ("bubblewrap", "namespaces", "process")
_JUDGE = Path(__file__).parent / "judge"
_INSIDE = "/judge"  # the path of the folder `judge` inside a sandbox
_MAX_ANSWER = 65536
_MEMORY_MIB = 1024  # the limit of a program
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from liger_trainer.runs.rewards.judge.{module} import main; main(*sys.argv[2:])"
)
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64")
_STORES = ("/nix/store", "/gnu/store", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Job:
    """A program and its tests: `tests` define `check(candidate)`, which calls the function `name`.

    `source` is the problem's own code, whose definitions the tests may use.
    """

    program: str
    source: str
    tests: str
    name: str


@dataclass(frozen=True)
class Verdict:
    """How many of the assertions held.

    `error` is the name of the first failure, or `timeout` for a process that reached a limit or
    ended too early. `note` states what could not be checked.
    """

    held: int = 0
    total: int = 0
    error: str | None = "timeout"
    note: str | None = None

    @property
    def share(self) -> float:
        return self.held / self.total if self.total else 0.0

    @property
    def passed(self) -> bool:
        return self.error is None and 0 < self.held == self.total


@functools.cache
def find_sandbox(choice: str = "auto") -> str:
    """Return the name of a sandbox that works here: `choice`, or the first safe one for "auto".

    Raises ValueError, with the reasons and the alternatives, if there is none.
    """
    reasons = []
    for name in SANDBOXES[:2] if choice == "auto" else (choice,):
        reason = _why_not(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        "reward.sandbox: nothing here can run code that is not trusted. "
        + "; ".join(reasons)
        + ". Install bubblewrap, or allow user namespaces; or, where this machine holds nothing of "
        "value (a container of its own), set `reward.sandbox: process`, which is unsafe: the code "
        "then has your rights"
    )


def judge(jobs: Iterable[Job], *, sandbox: str = "auto", seconds: int = 4) -> list[Verdict]:
    """Return the verdict of each job, in order; as many jobs run at a time as there are processors.

    `seconds` limits the processor time of a program, and separately that of its tests. The limit of
    wall time is five times as much, so that a busy machine does not change the outcome. No process
    or file is left behind.
    """
    return _judge(list(jobs), find_sandbox(sandbox), seconds)


def _judge(jobs: list[Job], sandbox: str, seconds: int) -> list[Verdict]:
    arguments = (str(seconds), str(_MEMORY_MIB))
    requests, theirs = socket.socketpair()
    with requests, _running(sandbox, "checker", arguments, theirs) as checker:

        def judge_one(job: Job) -> Verdict:
            with contextlib.ExitStack() as stack:
                report, their_report = map(stack.enter_context, socket.socketpair())
                calls, their_calls = map(stack.enter_context, socket.socketpair())
                stack.enter_context(_running(sandbox, "candidate", arguments, their_calls))
                try:
                    socket.send_fds(requests, [b"."], [calls.fileno(), their_report.fileno()])
                    calls.close()
                    their_report.close()
                    return _ask(report, job, time.monotonic() + 5 * seconds)
                except (OSError, ValueError):
                    ended = checker.poll() is not None
                    return Verdict(note="the checking process ended" if ended else None)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(judge_one, jobs))


def _ask(report: socket.socket, job: Job, deadline: float) -> Verdict:
    """Send the job and read the verdict. Raise OSError or ValueError if there is none."""
    message = wire.encode((job.program, job.source, job.tests, job.name))
    report.settimeout(max(0.01, deadline - time.monotonic()))
    report.sendall(len(message).to_bytes(8, "big") + message)
    answer = b""
    while piece := report.recv(65536):
        answer += piece
        if len(answer) > _MAX_ANSWER:
            raise ValueError("not a verdict")
        report.settimeout(max(0.01, deadline - time.monotonic()))
    match wire.decode(answer[8:]):
        case (int(held), int(total), str() | None as error, str() | None as note):
            if 0 <= held <= total:
                return Verdict(held, total, error, note)
    raise ValueError("not a verdict")


@contextlib.contextmanager
def _running(
    sandbox: str, module: str, arguments: tuple[str, ...], channel: socket.socket, stderr=None
) -> Iterator[subprocess.Popen]:
    """Run a process of `judge` with `channel` as its standard input; kill it after the block."""
    command, filter_ = _command(sandbox, module, arguments)
    with contextlib.ExitStack() as stack:
        given = []
        if filter_ is not None:
            read, write = os.pipe()
            stack.callback(os.close, read)
            os.write(write, filter_)
            os.close(write)
            given, command = [read], [part.replace("{filter}", str(read)) for part in command]
        process = subprocess.Popen(
            command,
            stdin=channel,
            stdout=subprocess.DEVNULL,
            stderr=stderr or subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},  # so that sets have the same order in every run
            start_new_session=True,
            pass_fds=given,
        )
    channel.close()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(
    sandbox: str, module: str, arguments: tuple[str, ...]
) -> tuple[list[str], bytes | None]:
    """Return the command line, and the filter that it reads from the descriptor `{filter}`, if any.

    The checking process must fork, so its children install the filter later.
    """
    entry = "namespaces" if sandbox == "namespaces" else module
    boot = _BOOT.replace("{module}", entry)
    python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", boot]
    if sandbox == "process":
        return [*python, str(_JUDGE.parents[3]), *arguments, ""], None
    filter_ = limits.system_call_filter()
    if sandbox == "namespaces":
        view = os.fsdecode(wire.encode(_view()))
        arguments = (view, module, *arguments, filter_.hex())
        return [*python, str(_JUDGE.parents[3]), *arguments], None
    options = [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")]
    options += ["--uid", "65534", "--gid", "65534", "--new-session", "--die-with-parent"]
    for operation, *paths in _view():
        options += [f"--{operation}", *paths]
        options += ["--remount-ro", *paths] if operation == "tmpfs" else []
    options += ["--remount-ro", "/", "--chdir", "/"]
    bubblewrap = [shutil.which("bwrap") or "bwrap", *options]
    if module == "checker":
        return [*bubblewrap, "--", *python, _INSIDE, *arguments, filter_.hex()], None
    bubblewrap += ["--seccomp", "{filter}", "--"]
    return [*bubblewrap, *python, _INSIDE, *arguments, ""], filter_


@functools.cache
def _view() -> list[tuple[str, ...]]:
    """Return the contents of a sandbox's file system: Python, its libraries, the folder `judge`.

    Installed packages are hidden, because HumanEval's holds the solutions.
    """
    python = Path(os.path.realpath(sys.executable))
    prefix = python.parents[1]
    view: list[tuple[str, ...]] = []
    bound: list[str] = []
    for path in (*_LIBRARIES, *_STORES, f"{prefix}/lib", f"{prefix}/lib64", str(python)):
        if os.path.islink(path):
            view.append(("symlink", os.readlink(path), path))
        elif os.path.exists(path) and not any(path.startswith(f"{b}/") for b in bound):
            view.append(("ro-bind", path, path))
            bound.append(path)
    for path in sorted({p for b in bound for p in glob.glob(f"{b}/python3*/*-packages")}):
        view.append(("tmpfs", path))
    view.append(("ro-bind", str(_JUDGE), f"{_INSIDE}/liger_trainer/runs/rewards/judge"))
    return view


def _why_not(name: str) -> str | None:
    """Return why this sandbox cannot be used here, or None if a trial job succeeds in it."""
    if not hasattr(os, "fork"):
        return "only on POSIX systems"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "the program `bwrap` is not installed"
    arguments = ("4", str(_MEMORY_MIB))
    try:
        ours, theirs = socket.socketpair()
        ours.close()
        with _running(name, "candidate", arguments, theirs, subprocess.PIPE) as process:
            output = process.communicate(timeout=60)[1].decode(errors="replace").strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if process.returncode:
        return output.splitlines()[-1] if output else f"exit code {process.returncode}"
    trial = Job("def f():\n    return 1", "", "def check(f):\n    assert f() == 1", "f")
    verdict = _judge([trial], name, 4)[0]
    return None if verdict.passed else f"a trial ended with {verdict.error}"
