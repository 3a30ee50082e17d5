"""Programs that attack the run, their tests, or their reward: nothing happens, and they get 0."""

import contextlib
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from liger_trainer.runs import sandbox
from liger_trainer.runs.judge import wire
from liger_trainer.runs.rewards import PassesTests, RewardArguments, guarded, row_check
from liger_trainer.runs.sandbox import Job, find_sandbox, judge

SOURCE = "import os\n\n\ndef half(n):\n    return n / 2\n\n\ndef twice(x):\n"
TESTS = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(4) == 8\n"
WRONG = "    return -7\n"
TWICE = "def twice(x):\n    return 2 * x\n"


@pytest.fixture(params=["bubblewrap", "namespaces"])
def safe(request):
    """The name of a sandbox; skipped, with the reason, where this machine has none of the kind."""
    try:
        return find_sandbox(request.param)
    except ValueError as error:
        pytest.skip(str(error))


def test_a_safe_sandbox_works_here():
    """Without one, all below would be skipped."""
    assert find_sandbox("auto") in ("bubblewrap", "namespaces")


def rewards(safe, *completions, tests=TESTS):
    count = len(completions)
    columns = {"source": [SOURCE], "tests": [tests], "entry_point": ["twice"]}
    columns = {key: value * count for key, value in columns.items()}
    return PassesTests(safe)(list(completions), **columns)


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
        "from liger_trainer.runs.sandbox import *\n"
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
    return {pid for pid, command in _processes().items() if "liger_trainer.runs.judge" in command}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("choice", ["auto", *sandbox.SANDBOXES])
def test_what_is_right_passes_in_every_sandbox(choice):
    try:
        find_sandbox(choice)
    except ValueError as error:
        pytest.skip(str(error))
    assert rewards(choice, "    return 2 * x\n", "    return 2\n", WRONG, "") == [1, 0.5, 0, 0]
    assert judge([], sandbox=choice) == []


def test_without_a_sandbox_the_recipe_is_refused_with_the_choices(monkeypatch):
    monkeypatch.setattr(sandbox, "_why_not", lambda name: "not here")
    find_sandbox.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"bubblewrap: not here; namespaces.*sandbox: process"):
            RewardArguments(["passes_tests"]).load()
        assert RewardArguments(["parses"]).load()  # runs nothing
    finally:
        find_sandbox.cache_clear()
    with pytest.raises(ValueError, match="'jail' is not one of auto, bubblewrap"):
        RewardArguments(["passes_tests"], sandbox="jail")


def test_what_tests_may_do(safe):
    def verdict(tests, body, source="", program=""):
        job = Job(f"{program}def f(*x):\n    {body}\n", source, tests, "f")
        return judge([job], sandbox=safe)[0]

    def check(*lines):
        return "def check(candidate):\n" + "".join(f"    {line}\n" for line in lines)

    cases = [
        # helpers of the problem, which the program cannot redefine
        (check("assert helper(candidate(1)) == 3"), "return x[0]", 1,
         "def helper(y): return y + 2\n"),
        # the function under its own name
        (check("assert f(1) == candidate(1) == (1,)"), "return x", 1, ""),
        # in place, where the result is dropped
        (check("xs = [3, 1]", "candidate(xs)", "assert xs == [1, 3]"), "x[0].sort()", 1, ""),
        # exceptions of built-in types; others are Exceptions
        (check("try: candidate()", "except KeyError: pass", "assert 1 + 1 == 2"),
         "return {}[1]", 1, ""),
        (check("try: candidate()", "except Exception: pass", "assert 1 + 1 == 2"),
         "raise type('Own', (Exception,), {})(2)", 1, ""),
        # values of all kinds
        (check("assert candidate({1: (2.5, {'a'})}, b'b', None, 1j, 10**5000, float('inf'))[0] == "
               "{1: (2.5, {'a'})}"), "return list(x)", 1, ""),
        (check("assert list(candidate(2)) == [2, 2]"), "yield from x * 2", 1, ""),
        # an assertion in a loop counts once
        (check("for i in range(9): assert candidate(i) == (i,)", "assert candidate() == 1"),
         "return x", 0.5, ""),
    ]  # fmt: skip
    for tests, body, share, source in cases:
        found = verdict(tests, body, source, "def helper(y): return 0\n")
        assert (found.share, found.note) == (share, None), tests


@pytest.mark.parametrize(
    ("tests", "body", "note"),
    [
        ("import nothing\n" + TESTS, "return 2 * x", "ModuleNotFoundError before they call"),
        (TESTS.replace("(1)", "(len)"), "return 2", "pass what is no plain data"),
        (TESTS, "return object()", "returned what is no plain data: object"),
    ],
)
def test_what_cannot_be_checked_is_told(safe, tests, body, note, caplog, monkeypatch):
    monkeypatch.setattr("liger_trainer.runs.rewards._warned", Counter())
    with caplog.at_level(logging.WARNING):
        assert rewards(safe, *[f"    {body}\n"] * 10, tests=tests)[0] < 1
    messages = [record.getMessage() for record in caplog.records]
    assert [m.split("(")[1].split(" ")[0] for m in messages] == ["1", "10"]
    assert all(note in message and "`twice`" in message for message in messages)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("def check(candidate)\n", "do not parse"),
        ("(" * 10_000, "do not parse"),
        ("assert f(1) == 2", "no function `check"),
        ("def check(candidate):\n    assert True\n", "no assertion"),
        (None, "tests are code"),
        ("\0", "do not parse|null bytes"),
    ],
)
def test_a_row_without_usable_tests_is_named_before_training(tests, message):
    good = {"tests": TESTS, "entry_point": "twice"}
    check = row_check([PassesTests("process")])
    assert re.search(rf"({message}).* \(twice\)$", check(good | {"tests": tests}))
    assert check(good) == ""


def test_such_a_row_gets_zero_and_ends_nothing(safe):
    assert rewards(safe, "    return 2 * x\n", tests="def check(candidate)\n") == [0.0]


def test_a_reward_that_is_no_number_or_raises_costs_its_row_alone(caplog):
    def own(completions, **_):
        return [
            {"text": "boom", "nan": float("nan"), "none": None}.get(c, 1 / len(c))
            for c in completions
        ]

    reward = guarded(own)
    completions = ["ab", "text", "", "nan", "none", "abcd"]
    columns = {"prompts": ["p"] * 6, "trainer_state": object()}
    with caplog.at_level(logging.WARNING):
        assert reward(completions=completions, **columns) == [0.5, 0, 0, 0, None, 0.25]
    assert reward.__name__ == "own"
    assert "ZeroDivisionError" in caplog.text or "no number" in caplog.text


def test_a_reward_that_never_worked_raises():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda completions, **_: [1 / 0 for _ in completions])(completions=["a", "b"])


VALUES = [
    None, True, 0, -1, 10**400, 0.1, float("inf"), 1j, "\ud800é", b"\0", bytearray(b"x"), [],
    [[()]], {1: {2: {3}}}, frozenset({1}), range(3), {"a": [1, None]},
]  # fmt: skip


def test_plain_data_comes_back_as_it_was():
    for value in [*VALUES, VALUES]:
        again = wire.decode(wire.encode(value))
        assert again == value
        assert type(again) is type(value)
    assert list(wire.decode(wire.encode(iter([1, 2])))) == [1, 2]
    assert type(wire.decode(wire.encode(type("I", (int,), {})(3)))) is int


@pytest.mark.parametrize("value", [object(), len, type, [lambda: 1], sys])
def test_other_data_does_not_travel(value):
    with pytest.raises(TypeError):
        wire.encode(value)


def test_bytes_that_are_no_plain_data_are_refused():
    good, generator = wire.encode(VALUES), random.Random(0)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        data = bytes(data[: generator.randint(0, len(data))])
        with contextlib.suppress(ValueError):
            wire.decode(data)
    for data in (b"l1:" * 10**5, b"l99999999999:", b"e1:l0:", b"r1:N", b"x1:a", b"NN", b""):
        with pytest.raises(ValueError, match=r"plain data"):
            wire.decode(data)
