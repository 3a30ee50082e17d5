"""`liger-trainer train`: run a recipe, or print what it would do."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING

from liger_trainer.runs.errors import INTERRUPTED
from liger_trainer.runs.secrets import hidden_override

if TYPE_CHECKING:
    from liger_trainer.runs.recipe.recipe import Recipe
    from liger_trainer.runs.run import RunResult


HELP = "train a model with a recipe"
EXAMPLES = """examples:
  liger-trainer train sft/smollm2-135m
  liger-trainer train mine.yaml training.learning_rate=2e-5 data.path=train.jsonl
  liger-trainer train mine.yaml --dry-run
  liger-trainer train mine.yaml --resume
  liger-trainer train mine.yaml --resume training.num_train_epochs=3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that run a recipe."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every value, the injection plan and problems, and do not train",
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue a run, or extend it")
    earlier.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in the output folder, once the new one has taken its first step",
    )
    # What `launch` was started by, for messages and the report.
    parser.add_argument("--command", help=argparse.SUPPRESS)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and its overrides."""
    recipe = parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or a name from `liger-trainer recipes`"
    )
    recipe.completer = _recipes
    add_overrides(parser, "overrides the recipe's value")


def add_overrides(parser: argparse.ArgumentParser, description: str) -> None:
    """Add `section.key=value`, any number of them."""
    # Without a default, argparse lists them among the arguments that are required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help=description
    )


def _recipes(prefix: str, **_) -> list[str]:
    """For completion in the shell."""
    from liger_trainer.runs.shipped import recipe_names

    return completions(prefix, recipe_names())


def completions(prefix: str, names: list[str]) -> list[str]:
    """Return those of `names`, and the YAML files and folders, that begin with `prefix`."""
    from glob import glob

    found = [*names, *glob(f"{prefix}*.yaml"), *glob(f"{prefix}*/")]
    return [name for name in found if name.startswith(prefix)]


def main(options: argparse.Namespace) -> int:
    """Train a model with a recipe, or print what would be done."""
    from liger_trainer.runs.processes import ending_together

    with ending_together(debug=options.debug):
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    from liger_trainer.runs.checks import conflicts, require
    from liger_trainer.runs.engine import is_first_on_machine
    from liger_trainer.runs.recipe.recipe import load_recipe
    from liger_trainer.runs.run import run

    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        return _dry_run(recipe, resume=options.resume, overwrite=options.overwrite)
    require(recipe)
    for conflict in conflicts(recipe) if is_first_on_machine() else ():
        print(f"warning: {conflict}", file=sys.stderr)
    command = options.command or _command(options)
    try:
        result = run(recipe, resume=options.resume, overwrite=options.overwrite, command=command)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or _interrupted_message(recipe, command)
        raise KeyboardInterrupt(message) from interrupt
    return _print_result(result, command)


def _command(options: argparse.Namespace) -> str:
    """Return the command line without `--resume` and `--overwrite`; another launcher than ours
    does not tell its own words."""
    words = shlex.join(["train", options.recipe, *map(hidden_override, options.overrides)])
    return f"{'... -m liger_trainer' if 'LOCAL_RANK' in os.environ else 'liger-trainer'} {words}"


def _print_result(result: RunResult, command: str) -> int:
    """Print the result of a run, and return the exit code."""
    if not result.is_main:
        return INTERRUPTED if result.interrupted else bool(result.warnings)
    if result.interrupted:
        print(
            f"Interrupted after step {result.summary['steps']}, with a checkpoint. Continue with:"
            f"\n  {command} --resume"
        )
        return INTERRUPTED
    print(_summary(result))
    for warning in result.warnings:
        print(f"error: {warning}", file=sys.stderr)
    return bool(result.warnings)


def _interrupted_message(recipe: Recipe, command: str) -> str:
    """Return a message that states which checkpoint an interrupted run can continue from."""
    from liger_trainer.runs import checkpoints
    from liger_trainer.runs import folder as run_folder

    earlier = run_folder.read(recipe.output_dir)
    checkpoint = earlier and checkpoints.newest(recipe.output_dir, earlier["id"])[0]
    if checkpoint is None:
        return "Interrupted at once: this run has left no complete checkpoint."
    return f"Interrupted at once: {checkpoint} is complete. Continue with:\n  {command} --resume"


def _dry_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> int:
    from liger_trainer.injection.walk import inject
    from liger_trainer.runs import checks
    from liger_trainer.runs import folder as run_folder
    from liger_trainer.runs.load import meta_model
    from liger_trainer.runs.recipe.resolved import resolved_yaml

    print(f"# {recipe.path}, resolved\n{resolved_yaml(recipe)}\n\n# Injection plan")
    found = [*checks.problems(recipe), *checks.conflicts(recipe)]
    refusal = run_folder.refusal(recipe, resume=resume, overwrite=overwrite)
    found += [refusal] if refusal else []
    training = recipe.values["training"]
    try:
        found += checks.model_problems(recipe)
        if training.get("use_liger_kernel"):
            model = recipe.adapted(meta_model(recipe.model, scores=recipe.kind.scores))
            print(inject(model, training.get("liger_kernel_config")))
        else:
            print("nothing: training.use_liger_kernel is off")
    except (OSError, ValueError) as error:  # an unreachable hub or a broken file
        print("not known: the model's configuration could not be loaded")
        found.append(f"model: {error}")
    for check in (checks.check_training, checks.check_data):
        try:
            check(recipe)
        except (OSError, ValueError) as error:
            found.append(str(error))
    print("\n# Conflicts")
    print("\n".join(f"- {' '.join(conflict.split())}" for conflict in found) or "none")
    return 1 if found else 0


def _summary(result: RunResult) -> str:
    """Return the closing lines of a run."""
    from liger_trainer.runs.report.summary import headline_metrics

    numbers = result.summary
    lines = [
        (f"held-out {name}", f"{before} before, {after} after")
        for name, before, after in headline_metrics(numbers["held_out"])
    ] or [
        (f"training {name}", f"{first} at first, {last} at last")
        for name, first, last in headline_metrics(numbers["training"])
    ]
    if numbers["tokens_per_second"]:
        lines.append(("speed", f"{numbers['tokens_per_second']:,.0f} tokens/s"))
    lines += [
        ("peak memory", f"{numbers['peak_memory_gib']:.2f} GiB"),
        ("steps", f"{numbers['steps']:,} in {numbers['minutes']:.1f} minutes"),
        ("model", str(result.output_dir)),
        ("report", str(result.report)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
