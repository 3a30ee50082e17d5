"""`liger-trainer evaluate`: the held-out metrics of a run's model, or its scores on benchmarks."""

from __future__ import annotations

import argparse
import json

from liger_trainer.commands.train import add_overrides

HELP = "compute held-out metrics of a run's model, or its scores on tasks of lm-eval"
EXAMPLES = """examples:
  liger-trainer evaluate runs/smollm2-135m
  liger-trainer evaluate runs/mine data.path=other.jsonl data.eval_fraction=0.5 --json
  liger-trainer evaluate runs/mine --tasks hellaswag gsm8k --limit 200
  liger-trainer evaluate runs/mine model.dtype=bfloat16 --tasks my_task.yaml --chat
"""

_BATCH_SIZE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    add_overrides(parser, "overrides the run's value")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    tasks = parser.add_argument_group("tasks of lm-eval, in place of the held-out examples")
    tasks.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="names of tasks or groups, or YAML files"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="examples of each task (all)")
    tasks.add_argument(
        "--batch-size", type=int, metavar="N", help=f"examples at once ({_BATCH_SIZE})"
    )
    tasks.add_argument("--chat", action="store_true", help="use the model's chat template")


def main(options: argparse.Namespace) -> int:
    """Print each metric of the held-out examples, or of the named tasks."""
    if options.tasks:
        return _tasks(options)
    for name, default in (("limit", None), ("batch_size", None), ("chat", False)):
        if getattr(options, name) is not default:
            raise ValueError(f"--{name.replace('_', '-')} goes with --tasks")
    return _held_out(options)


def _held_out(options: argparse.Namespace) -> int:
    """Print each held-out metric, as it is now and as the run recorded it."""
    from liger_trainer.commands.console import print_table
    from liger_trainer.runs.build import load_trained
    from liger_trainer.runs.checks import require
    from liger_trainer.runs.finished import open_run
    from liger_trainer.runs.report.summary import held_out

    # Nothing is reported, and no step is taken.
    unused = ["training.report_to=none", "training.optim=adamw_torch"]
    run = open_run(options.run, [*options.overrides, *unused])
    require(run.recipe)
    trainer, prepared = load_trained(run.recipe, run.path)
    if prepared.eval is None:
        raise ValueError(
            "evaluate: the recipe has no held-out examples; set data.eval_fraction=0.1, for example"
        )
    now = {k: v[-1] for k, v in held_out([trainer.evaluate()]).items()}
    if options.json:
        print(json.dumps(now, indent=2))
        return 0
    recorded = run.record["summary"]["held_out"]
    then = {name: last for name, (_, last) in recorded.items() if last is not None}
    print_table(
        ["held out", "now", "after training"],
        [
            [name, f"{value:.4f}", f"{then[name]:.4f}" if name in then else ""]
            for name, value in now.items()
        ],
    )
    return 0


def _tasks(options: argparse.Namespace) -> int:
    """Print the model's metrics on tasks of lm-eval."""
    from liger_trainer.commands.console import print_table
    from liger_trainer.runs import benchmarks
    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.finished import open_run

    for name in ("limit", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    others = [word for word in options.overrides if not word.startswith("model.")]
    if others:
        raise ValueError(f"{others[0]}: with --tasks, only keys of `model` have an effect")
    run = open_run(options.run, options.overrides)
    if run.recipe.kind.scores:
        raise ValueError("evaluate --tasks: a reward model scores texts, and writes none")
    require_for_model(run.tuned)
    found = benchmarks.measure(
        run.tuned,
        options.tasks,
        limit=options.limit,
        batch_size=options.batch_size or _BATCH_SIZE,
        chat=options.chat,
    )
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [
        [task, name, f"{value:.4f}", _deviation(values, name)]
        for task, values in found.items()
        for name, value in values.items()
        if "_stderr" not in name
    ]
    print_table(["task", "metric", "value", "standard error"], rows)
    return 0


def _deviation(values: dict[str, float], name: str) -> str:
    metric, comma, filtered = name.partition(",")
    value = values.get(f"{metric}_stderr{comma}{filtered}")
    return "" if value is None else f"{value:.4f}"
