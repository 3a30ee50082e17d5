"""Rewards for GRPO: functions of completions, named in the section `reward`.

A reward function takes `completions` and, by name, the columns of the dataset that it needs, and
returns a number for each completion. Completions are strings or lists of chat messages.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from liger_trainer.runs.sandbox import run_programs

_SECONDS = 2  # of processor time for all assertions of a problem; solutions take milliseconds
Reward = Callable[..., list[float]]
_FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


@dataclass(frozen=True)
class RewardArguments:
    """The `reward` section. `training.reward_weights` weighs the functions; without it, equally."""

    functions: list[str] | None = None  # of REWARDS, or `module:function` of your own

    def __post_init__(self):
        for name in self.functions or ():
            if not isinstance(name, str) or (name not in REWARDS and ":" not in name):
                raise ValueError(
                    f"reward.functions: no function {name!r}; there is {', '.join(REWARDS)}, and "
                    "`module:function` for one of your own"
                )

    def load(self) -> list[Reward]:
        """The functions. Raises ValueError for a module or a function that cannot be found."""
        return [REWARDS.get(name) or _imported(name) for name in self.functions]


def columns_of(rewards: list[Reward]) -> list[str]:
    """Dataset columns that the functions cannot do without: their parameters without default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [
        parameter.name
        for reward in rewards
        for parameter in inspect.signature(reward).parameters.values()
        if parameter.kind in named and parameter.default is inspect.Parameter.empty
    ]
    return [name for name in dict.fromkeys(found) if name not in _FROM_TRL]


def parses(completions, *, source, **_) -> list[float]:
    """The share of a completion's lines, from the first on, that is Python, between 0 and 1.

    It is read as what continues `source`, and as a program of its own; the better of the two
    counts. Prose and code fences are not Python.
    """
    texts = map(text_of, completions)
    return [_leading_code(s, t)[1] for s, t in zip(source, texts, strict=True)]


def defines_function(completions, *, source, entry_point, **_) -> list[float]:
    """1 where `source` and the leading code of the completion define a function that returns
    something, else 0: a function with nothing but its docstring is not written yet."""
    texts = map(text_of, completions)
    return [
        float(_returns(_leading_code(s, t)[0], name))
        for s, t, name in zip(source, texts, entry_point, strict=True)
    ]


def passes_tests(completions, *, source, tests, entry_point, **_) -> list[float]:
    """The share of the problem's assertions that hold, between 0 and 1.

    `tests` defines `check(candidate)`; assertions of constants are not counted. The code runs in a
    process of its own, with limits (see `sandbox`). What never defines the function gets 0.
    """
    columns = zip(source, map(text_of, completions), tests, entry_point, strict=True)
    programs = [
        _tested(code, test, name)
        if _returns(code := _leading_code(s, t)[0], name)
        else "RESULT = 0"
        for s, t, test, name in columns
    ]
    outcomes = run_programs(programs, seconds=_SECONDS)
    return [float(outcome.result) if outcome.passed else 0.0 for outcome in outcomes]


REWARDS: dict[str, Reward] = {
    "parses": parses,
    "defines_function": defines_function,
    "passes_tests": passes_tests,
}


def text_of(completion: str | list[dict]) -> str:
    """What was written: the string, or the contents of the messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def _leading_code(source: str, text: str) -> tuple[str, float]:
    """The longest program from the first lines of `text`, and their share of its lines."""
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
    """The lines with which `source` imports names that a whole function may use."""
    lines = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    return "".join(line + "\n" for line in lines)


def _is_python(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # odd escapes in generated strings
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of generated text
        return False
    return True


def _returns(program: str, name: str) -> bool:
    """Whether the program's last function `name` has a return or yield with a value."""
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


def _tested(program: str, tests: str, entry_point: str) -> str:
    """The program, its tests with each assertion on its own, and the share that held."""
    tree = ast.parse(tests)
    check = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check")
    check.body = [_guarded(s) if _asserts(s) else s for s in check.body if not _is_trivial(s)]
    counters = "HELD = []\n"
    call = f"check({entry_point})\nRESULT = sum(HELD) / len(HELD) if HELD else 0\n"
    return f"{counters}{program}\n{ast.unparse(ast.fix_missing_locations(tree))}\n{call}"


def _guarded(statement: ast.stmt) -> ast.stmt:
    guard = ast.parse("try:\n    HELD.append(1)\nexcept Exception:\n    HELD.append(0)").body[0]
    guard.body.insert(0, statement)
    return guard


def _asserts(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def _is_trivial(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant)


def _imported(name: str) -> Reward:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.functions: {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"reward.functions: {name!r} is a {type(found).__name__}, no function")
    return found
