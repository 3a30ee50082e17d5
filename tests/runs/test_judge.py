"""What a problem's tests may do, and what is said of those that cannot be checked."""

import logging
from collections import Counter

import pytest
from judged import TESTS, WRONG, rewards

from liger_trainer.runs.data.rows import RowError
from liger_trainer.runs.rewards import sandbox
from liger_trainer.runs.rewards.rewards import PassesTests, RewardArguments, row_check
from liger_trainer.runs.rewards.sandbox import Job, find_sandbox, judge


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
    monkeypatch.setattr("liger_trainer.runs.rewards.rewards._warned", Counter())
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
    with pytest.raises(RowError, match=rf"({message}).* \(twice\)$"):
        check(good | {"tests": tests})
    check(good)


def test_such_a_row_gets_zero_and_ends_nothing(safe):
    assert rewards(safe, "    return 2 * x\n", tests="def check(candidate)\n") == [0.0]
