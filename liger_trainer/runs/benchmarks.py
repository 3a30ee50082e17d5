"""Tasks of EleutherAI's lm-eval (HellaSwag, GSM8K, a YAML file of one's own) on a trained model."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from liger_trainer.runs.load import ModelArguments, load_for_generation, load_tokenizer
from liger_trainer.runs.packages import Need

NEED = Need("evaluate --tasks", ("lm-eval",))


def _task_manager(tasks: Sequence[str]):
    """Return lm-eval's task manager. Raises ValueError if lm-eval or a task is missing."""
    if not NEED.is_met:
        raise ValueError(str(NEED))
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager()
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml"):
            if not Path(task).is_file():
                raise ValueError(f"--tasks: there is no file {task!r}")
        elif not manager.match_tasks([task]):
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            near = f"; do you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"--tasks: lm-eval has no task {task!r}{near}")
    return manager


def measure(
    arguments: ModelArguments,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    chat: bool,
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, `NAME` and `NAME_stderr`.

    Args:
        tasks: names, of tasks or of groups, or YAML files.
        limit: examples of each task; None takes all.
        chat: put the prompts into the model's chat template.

    Raises ValueError if lm-eval or a task is missing, and if a task cannot be loaded or run.
    """
    manager = _task_manager(tasks)
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(arguments)
    model = HFLM(load_for_generation(arguments), tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat,
            log_samples=False,
        )  # fmt: skip
    except Exception as error:  # tasks are other people's code and data
        raise ValueError(f"--tasks: {type(error).__name__}: {error}") from error
    metrics = found["results"] | found.get("groups", {})
    return {task: _numbers(values) for task, values in metrics.items()}


def _numbers(values: dict[str, object]) -> dict[str, float]:
    """Return the metrics among lm-eval's results of a task: "acc,none" is named acc, "acc,FILTER"
    keeps its filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, (int, float))
    }
