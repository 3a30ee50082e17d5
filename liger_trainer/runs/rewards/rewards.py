"""Rewards for GRPO: functions of completions, named in the section `reward`.

A reward function takes `completions` and, by name, the columns of the dataset that it needs, and
returns a number for each completion. Completions are strings or lists of chat messages.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liger_trainer.runs.data.rows import RowError
from liger_trainer.runs.rewards.judge.checker import compile_tests
from liger_trainer.runs.rewards.sandbox import SANDBOXES, Job, find_sandbox, judge

logger = logging.getLogger(__name__)

_SECONDS = 2  # processor time for all assertions of a problem; solutions take milliseconds
Reward = Callable[..., Any]  # returns a list of numbers; an asynchronous one, a coroutine
_FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


@dataclass(frozen=True)
class RewardArguments:
    """The `reward` section. `training.reward_weights` weighs the functions; without it, equally."""

    functions: list[str] | None = None  # names of REWARDS, or your own as `module:function`
    sandbox: str = "auto"  # where generated code runs: "auto" or a sandbox; `process` is unsafe

    def __post_init__(self):
        for name in self.functions or ():
            if not isinstance(name, str) or (name not in REWARDS and ":" not in name):
                raise ValueError(
                    f"reward.functions: no function {name!r}; the functions are "
                    f"{', '.join(REWARDS)}, and `module:function` for your own"
                )
        if self.sandbox not in ("auto", *SANDBOXES):
            raise ValueError(
                f"reward.sandbox: {self.sandbox!r} is not one of auto, {', '.join(SANDBOXES)}"
            )

    def load(self) -> list[Reward]:
        """Return the functions.

        Raises ValueError for a module or function that cannot be found, and if a function runs
        generated code but no sandbox works.
        """
        found = [REWARDS.get(name) or _imported(name) for name in self.functions]
        if passes_tests in found:
            found[found.index(passes_tests)] = PassesTests(find_sandbox(self.sandbox))
        return found


def columns_of(rewards: list[Reward]) -> list[str]:
    """Return the dataset columns that the functions require: their parameters without default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [
        parameter.name
        for reward in rewards
        for parameter in inspect.signature(reward).parameters.values()
        if parameter.kind in named and parameter.default is inspect.Parameter.empty
    ]
    return [name for name in dict.fromkeys(found) if name not in _FROM_TRL]


def row_check(rewards: list[Reward]) -> Callable[[dict], None] | None:
    """Return a function that raises RowError for a row that can never be rewarded, or None."""
    return next((r.check_row for r in rewards if isinstance(r, PassesTests)), None)


def guarded(reward: Reward) -> Reward:
    """Return a version of `reward` that tolerates failures on single completions.

    A completion on which `reward` raises, or returns no finite number, gets 0 and a counted
    warning. None stays None, which TRL treats as not applicable. If `reward` raises on every
    completion and has never worked before, the exception is raised.
    """
    if inspect.iscoroutinefunction(reward):
        return reward
    works = False

    @functools.wraps(reward)
    def guarded_reward(completions, **columns):
        nonlocal works
        try:
            values = list(reward(completions=completions, **columns))
            if len(values) != len(completions):
                raise ValueError(f"{len(values)} rewards for {len(completions)} completions")
        except Exception as error:
            values = _one_by_one(reward, completions, columns)
            if not works and all(isinstance(value, Exception) for value in values):
                raise error
        works = True
        return [_number(reward.__name__, value) for value in values]

    return guarded_reward


def _one_by_one(reward: Reward, completions, columns: dict) -> list:
    """Return the rewards of completions, computed one at a time; an exception if one raises."""
    values = []
    for i, completion in enumerate(completions):
        row = {
            key: [column[i]]
            if isinstance(column, list) and len(column) == len(completions)
            else column
            for key, column in columns.items()
        }
        try:
            (value,) = reward(completions=[completion], **row)
        except Exception as error:
            value = error
        values.append(value)
    return values


def _number(name: str, value) -> float | None:
    try:
        if value is None or math.isfinite(float(value)):
            return None if value is None else float(value)
        reason = f"{value} is not finite"
    except (TypeError, ValueError, OverflowError):
        failed = isinstance(value, Exception)
        reason = f"{type(value).__name__}: {value}" if failed else f"{value!r:.80} is no number"
    _warn(f"{name}: 0 for a completion", reason)
    return 0.0


_warned: Counter[str] = Counter()


def _warn(what: str, reason: str) -> None:
    """Log a warning the 1st, 10th, 100th, ... time, with the count."""
    _warned[what] += 1
    if str(_warned[what]).strip("0") == "1":
        logger.warning("%s (%d so far): %s", what, _warned[what], reason)


def parses(completions, *, source, **_) -> list[float]:
    """Return the share of a completion's leading lines that are Python, between 0 and 1.

    A completion is read as a continuation of `source` and as a program of its own; the larger share
    counts. Prose and code fences are not Python.
    """
    texts = map(text_of, completions)
    return [_leading_code(s, t)[1] for s, t in zip(source, texts, strict=True)]


def defines_function(completions, *, source, entry_point, **_) -> list[float]:
    """Return 1 for a completion that, with `source`, defines a function that returns a value.

    Others get 0: a function with only a docstring is not written yet.
    """
    texts = map(text_of, completions)
    return [
        float(_returns(_leading_code(s, t)[0], name))
        for s, t, name in zip(source, texts, entry_point, strict=True)
    ]


@dataclass(frozen=True)
class PassesTests:
    """The share of the problem's assertions that hold, between 0 and 1.

    `tests` defines `check(candidate)`; assertions of constants are not counted. The code runs in a
    sandbox, where it answers calls with plain data (see `sandbox.py`). A completion that never
    defines the function, or reaches a limit, gets 0. So does one that cannot be checked, with a
    warning.
    """

    sandbox: str = "auto"
    __name__ = "passes_tests"

    def __call__(self, completions, *, source, tests, entry_point, **_) -> list[float]:
        columns = zip(source, map(text_of, completions), tests, entry_point, strict=True)
        jobs = [Job(_leading_code(s, t)[0], s, test, name) for s, t, test, name in columns]
        written = [i for i, job in enumerate(jobs) if _returns(job.program, job.name)]
        rewards = [0.0] * len(jobs)
        verdicts = judge([jobs[i] for i in written], sandbox=self.sandbox, seconds=_SECONDS)
        for i, verdict in zip(written, verdicts, strict=True):
            rewards[i] = verdict.share
            if verdict.note:
                _warn(f"passes_tests: 0 for `{jobs[i].name}`", verdict.note)
        return rewards

    def check_row(self, row: dict) -> None:
        """Raise RowError for tests that no completion could pass."""
        try:
            compile_tests(row["tests"], row["entry_point"])
        except ValueError as error:
            raise RowError(f"{error} ({row['entry_point']})") from error


passes_tests = PassesTests()

REWARDS: dict[str, Reward] = {
    "parses": parses,
    "defines_function": defines_function,
    "passes_tests": passes_tests,
}


def text_of(completion: str | list[dict]) -> str:
    """Return the text of a completion: the string, or the contents of the messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def _leading_code(source: str, text: str) -> tuple[str, float]:
    """Return the longest valid program from the first lines of `text`, and their share of all."""
    lines = text.rstrip().splitlines()
    written = sum(bool(line.strip()) for line in lines)
    for count in range(len(lines), 0, -1):
        head = "\n".join(lines[:count]) + "\n"
        share = sum(bool(line.strip()) for line in lines[:count]) / written
        for program in (source + head, _imports(source) + head):
            if share and _is_python(program):
                return program, share
    return source, 0.0


def _imports(source: str) -> str:
    """Return the import lines of `source`, which a complete function may rely on."""
    lines = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    return "".join(line + "\n" for line in lines)


def _is_python(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in generated strings
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # generated text may be anything
        return False
    return True


def _returns(program: str, name: str) -> bool:
    """Return whether the program's last function `name` returns or yields a value."""
    if not _is_python(program):
        return False
    functions = [
        node
        for node in ast.parse(program).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return bool(functions) and any(
        isinstance(node, (ast.Return, ast.Yield)) and node.value is not None
        for node in ast.walk(functions[-1])
    )


def _imported(name: str) -> Reward:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.functions: {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"reward.functions: {name!r} is a {type(found).__name__}, not a function")
    return found
