"""Programs that attack the run, their tests, or their reward: nothing happens, and they get 0."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from judged import TESTS, WRONG, rewards

from liger_trainer.runs.rewards.sandbox import Job, find_sandbox, judge

TWICE = "def twice(x):\n    return 2 * x\n"


def test_a_safe_sandbox_works_here():
    """Without one, all below would be skipped."""
    assert find_sandbox("auto") in ("bubblewrap", "namespaces")


CLAIMS = {
    "sum": "def sum(values):\n    return 3e8\n",
    "negative": "def sum(values):\n    return -3e8\n",
    "nan": "def sum(values):\n    return float('nan')\n",
    "inf": "def sum(values):\n    return float('inf')\n",
    "text": "class R:\n    def __truediv__(self, n):\n        return 'boom'\n"
    "def sum(values):\n    return R()\n",
    "builtins": "import builtins\nbuiltins.sum = builtins.max = lambda values: 1e9\n"
    "builtins.len = lambda values: 1\nbuiltins.AssertionError = None\n",
    "result": "RESULT = 1\nHELD = [1, 1]\n",
    "main": "import __main__\nclaim = getattr(__main__, 'secret', '') + ' passed 1'\n"
    "os.write(getattr(__main__, 'report', 1), claim.encode())\nos._exit(0)\n",
}

# What the function itself does, before it returns what is wrong.
ACTS = {
    "held": "HELD.append(1)\nHELD[:] = [1] * 100",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for scope in (frame.f_globals, frame.f_locals):\n"
    "        if 'HELD' in scope: scope['HELD'][:] = [1] * 9\n"
    "    frame = frame.f_back",
    "collector": "import gc\nfor found in gc.get_objects():\n"
    "    if type(found) is list: found[:] = [1] * len(found)",
    "secret": "secret = open('/proc/self/cmdline', 'rb').read().split(b'\\0')[-2]\n"
    "for fd in range(64):\n    try: os.write(fd, secret + b' passed 1')\n    except OSError: pass\n"
    "os._exit(0)",
    "forks": "for _ in range(200):\n    if os.fork() == 0: break",
    "exit": "os._exit(0)",
    "system exit": "raise SystemExit(0)",
    "equal": "class Equal(int):\n    def __eq__(self, other): return True\n"
    "    def __hash__(self): return 1\nreturn Equal()",
    "flood": "for fd in range(3, 64):\n"
    "    try: os.write(fd, b'T' * 10**6)\n    except OSError: pass",
    "endless": "while True: pass",
    "memory": "bytearray(10**10)",
    "recursion": "def again(): return again()\nagain()",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "threads": "import threading, time\nwhile True:\n"
    "    threading.Thread(target=time.sleep, args=(99,)).start()",
    "limits": "import resource\n"
    "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))\nwhile True: pass",
    "closed": "os.closerange(0, 64)",
}


def test_a_wrong_solution_cannot_claim_a_reward(safe):
    found = rewards(safe, *(f"{WRONG}\n{claim}" for claim in CLAIMS.values()))
    assert dict(zip(CLAIMS, found, strict=True)) == dict.fromkeys(CLAIMS, 0.0)


def test_nor_by_what_its_function_does(safe):
    bodies = [
        "".join(f"    {line}\n" for line in act.splitlines()) + WRONG for act in ACTS.values()
    ]
    found = dict(zip(ACTS, rewards(safe, *bodies), strict=True))
    assert found == dict.fromkeys(ACTS, 0.0)


def test_a_list_that_the_answer_is_compared_with_is_a_copy(safe):
    tests = "def check(candidate):\n    xs = [3, 1, 2]\n    assert candidate(xs) == sorted(xs)\n"
    assert rewards(safe, "    x.clear()\n    return []\n", tests=tests) == [0.0]
    assert rewards(safe, "    x.sort()\n    return x\n", tests=tests) == [1.0]


HOST = {
    "delete": "os.remove(path)",
    "rename": "os.rename(path, path + '2')",
    "truncate": "os.truncate(path, 0)",
    "rewrite": "open(path, 'w').write('gone')",
    "map": "import mmap\nf = open(path, 'r+b')\nmmap.mmap(f.fileno(), 0)[:1] = b'X'",
    "chmod": "os.chmod(path, 0)",
    "litter": "open(os.path.dirname(path) + '/new', 'w')",
    "temporary": "os.mkdir('/tmp/' + marker)",
    "here": "open('litter', 'w')",
    "memory": "open(f'/proc/{pid}/mem', 'r+b')",
    "environment": "open(f'/proc/{pid}/environ', 'rb').read()",
    "parent": "open(f'/proc/{os.getppid() or pid}/environ', 'rb').read()",
    "own environment": "assert not set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}\n1 / 0",
    "read": "open(path).read()",
    "solutions": "os.listdir(packages)",
    "kill": "os.kill(pid, 9)",
    "terminate": "os.kill(pid, 15)",
    "stop": "os.kill(pid, 19)",
    "everybody": "os.kill(-1, 15)",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', port), 2).send(b'leak')",
    "abstract": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(abstract)",
    "spawn": "import subprocess\nsubprocess.Popen(['/bin/sleep', marker], start_new_session=True)",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n"
    "    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', marker])",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0",
    "namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "device": "open('/dev/mem', 'rb')",
}  # fmt: skip


def test_the_host_is_out_of_reach(safe, tmp_path, monkeypatch):
    """Each act raises in the sandbox, and nothing outside has changed."""
    file = tmp_path / "weights.bin"
    file.write_text("precious")
    file.chmod(0o640)
    temporary, root = tmp_path / "temporary", set(os.listdir("/"))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    abstract = f"\0liger-trainer-{os.getpid()}"
    marker = f"9{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
        subprocess.Popen(["sleep", "99"]) as victim,
    ):
        unix.bind(abstract)
        unix.listen()
        known = {"path": str(file), "pid": victim.pid, "marker": marker, "abstract": abstract}
        known |= {"port": server.getsockname()[1], "packages": os.path.dirname(pytest.__path__[0])}
        jobs = []
        for act in HOST.values():
            given = [*(f"{key} = {value!r}" for key, value in known.items()), *act.splitlines()]
            body = "".join(f"    {line}\n" for line in given)
            tests = "def check(f):\n    try:\n        f()\n    except Exception as error:\n"
            tests += "        assert not isinstance(error, NameError), error\n    else:\n"
            tests += "        assert not 'it worked'\n"
            jobs.append(Job(f"import os\ndef f():\n{body}    return 1\n", "", tests, "f"))
        found = dict(zip(HOST, (v.error for v in judge(jobs, sandbox=safe)), strict=True))
        still_runs = victim.poll() is None and _state(victim.pid) != "T"
        victim.kill()
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert found == dict.fromkeys(HOST)
    assert still_runs
    assert file.read_text() == "precious"
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["temporary", "weights.bin"]
    assert not os.listdir(temporary)
    assert set(os.listdir("/")) == root
    assert not Path("/tmp", marker).exists()
    assert not any(marker in command for command in _processes().values())


def test_nothing_of_a_sandbox_is_left(safe):
    """Neither of one that ends by itself nor of one that is ended by the wall clock."""
    before, seen = _judging(), set()
    sleeping, quick = "    import time\n    time.sleep(77)\n", "    return 2 * x\n"
    programs = [f"def twice(x):\n{body}" for body in (quick, sleeping)]
    jobs = [Job(program, "", TESTS, "twice") for program in programs]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(judge, jobs, sandbox=safe, seconds=1)
        while not future.done():
            seen |= _judging() - before
            time.sleep(0.05)
    assert [verdict.error for verdict in future.result()] == [None, "timeout"]
    assert len(seen) >= 3
    _wait_until_gone(before)


def _wait_until_gone(before: set[int]) -> None:
    deadline = time.monotonic() + 30  # a busy machine ends them late
    while _judging() - before:
        assert time.monotonic() < deadline, _processes()
        time.sleep(0.05)


def test_the_sandbox_ends_with_the_run(safe):
    """Also where the run is killed."""
    program = "def f(x):\n    import time\n    time.sleep(77)\n"
    run = (
        "from liger_trainer.runs.rewards.sandbox import *\n"
        f"print(judge([Job({program!r}, '', {TESTS!r}, 'f')], sandbox={safe!r}, seconds=60))"
    )
    before = _judging()
    process = subprocess.Popen([sys.executable, "-c", run])
    deadline = time.monotonic() + 30
    while len(_judging() - before - {process.pid}) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    _wait_until_gone(before)


def test_output_does_not_grow_the_run(safe):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    flood = "import os\npiece = b'x' * 10**6\nfor i in range(300):\n    os.write({}, piece)\n"
    floods = [f"{flood.format(fd)}\n{TWICE}" for fd in (1, 2, 3, 4)]
    huge = "def twice(x):\n    return 'x' * 50_000_000\n"
    deep = "def twice(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y\n"
    jobs = [Job(program, "", TESTS, "twice") for program in (*floods, huge, deep)]
    before = resident()
    found = [verdict.share for verdict in judge(jobs, sandbox=safe)]
    assert resident() - before < 30
    assert found[:2] == [1, 1]  # printing is no crime
    assert found[4:] == [0, 0]


def _processes() -> dict[int, str]:
    """The command line of every process by its id, without those that have ended."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    return {pid: command for pid, command in found.items() if command}  # a zombie has none


def _judging() -> set[int]:
    """Ids of the processes in which something is judged."""
    return {
        pid
        for pid, command in _processes().items()
        if "liger_trainer.runs.rewards.judge" in command
    }


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
