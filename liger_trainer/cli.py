"""The command line: `liger-trainer train` and `liger-trainer inspect`."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liger_trainer.runs.recipe import Recipe
    from liger_trainer.runs.run import RunResult

REFUSED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done; 1: `--strict` or `--dry-run` found something; 2: wrong input; 130: interrupted.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and (options.command is not train or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest  # overrides that stand after an option
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("\nInterrupted outside of training: nothing was lost.", file=sys.stderr)
        return INTERRUPTED


def train(options: argparse.Namespace) -> int:
    """`liger-trainer train`: runs a recipe, or says what it would do."""
    from liger_trainer.runs.plan import conflicts
    from liger_trainer.runs.recipe import load_recipe

    overrides = [*options.overrides, *options.rest]
    recipe = load_recipe(options.recipe, overrides)
    if options.dry_run:
        return _dry_run(recipe, resume=options.resume, overwrite=options.overwrite)
    for conflict in conflicts(recipe):
        print(f"warning: {conflict}", file=sys.stderr)
    from liger_trainer.runs.run import run

    result = run(recipe, resume=options.resume, overwrite=options.overwrite)
    if result.interrupted:
        command = shlex.join(["liger-trainer", "train", options.recipe, *overrides, "--resume"])
        print(
            f"Interrupted after step {result.summary['steps']}, with a checkpoint. Continue with:"
        )
        print(f"  {command}")
        return INTERRUPTED
    print(_summary(result))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`liger-trainer inspect`: the injection report of a model, from its configuration alone."""
    from liger_trainer.runs.load import ModelArguments
    from liger_trainer.runs.plan import injection_plan

    path = Path(options.model)
    if path.suffix == ".gguf":
        model = ModelArguments(str(path.parent), gguf_file=path.name)
    else:
        model = ModelArguments(options.model, trust_remote_code=options.trust_remote_code)
    report = injection_plan(model)
    print(report.to_json() if options.json else report)
    refused = sum(eligible - swapped for swapped, eligible in report.coverage.values())
    if options.strict and refused:
        print(f"error: {refused} eligible sites would not be swapped", file=sys.stderr)
        return REFUSED
    return 0


def _dry_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> int:
    from liger_trainer.runs import folder as run_folder
    from liger_trainer.runs.plan import conflicts, injection_plan, model_conflicts, resolved_yaml

    print(f"# {recipe.path}, resolved\n{resolved_yaml(recipe)}\n\n# Injection plan")
    found = conflicts(recipe)
    refusal = run_folder.refusal(recipe, resume=resume, overwrite=overwrite)
    found += [refusal] if refusal else []
    try:
        recipe.training_arguments()
    except ValueError as error:
        found.append(str(error))
    training = recipe.values["training"]
    try:
        found += model_conflicts(recipe)
        if training.get("use_liger_kernel"):
            print(injection_plan(recipe.model, training.get("liger_kernel_config")))
        else:
            print("nothing: training.use_liger_kernel is off")
    except OSError as error:  # the hub cannot be reached
        print("not known: the model's configuration could not be loaded")
        found.append(f"model: {error}")
    print("\n# Conflicts")
    print("\n".join(f"- {conflict}" for conflict in found) or "none")
    return REFUSED if found else 0


def _summary(result: RunResult) -> str:
    """The closing lines of a run."""
    from liger_trainer.runs.html import telling

    numbers = result.summary
    lines = [(f"held-out {name}", f"{b} before, {a} after") for name, b, a in telling(numbers)]
    if numbers["tokens_per_second"]:
        lines.append(("speed", f"{numbers['tokens_per_second']:,.0f} tokens/s"))
    lines += [
        ("peak memory", f"{numbers['peak_memory_gib']:.2f} GiB"),
        ("steps", f"{numbers['steps']:,} in {numbers['minutes']:.1f} minutes"),
        ("checkpoint", str(result.output_dir)),
    ]
    if result.report:
        lines.append(("report", str(result.report)))
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="liger-trainer", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", parents=[shared], help="run a recipe")
    command.add_argument("recipe", metavar="RECIPE.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="wins over the recipe's value"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print configuration, injection plan and conflicts"
    )
    command.add_argument("--resume", action="store_true", help="continue an interrupted run")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output folder"
    )
    command.set_defaults(command=train)

    command = commands.add_parser(
        "inspect", parents=[shared], help="what would be swapped in a model, without its weights"
    )
    command.add_argument("model", metavar="MODEL_OR_PATH", help="hub name, folder or .gguf file")
    command.add_argument(
        "--strict", action="store_true", help="exit 1 if an eligible site is refused"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--trust-remote-code", action="store_true", default=None)
    command.set_defaults(command=inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
