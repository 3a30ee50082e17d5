"""`liger-trainer inspect`: the injection report of a model, from its configuration alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "show what would be swapped in a model, without loading weights"
EXAMPLES = """examples:
  liger-trainer inspect Qwen/Qwen3-8B
  liger-trainer inspect models/mine.gguf --json
  liger-trainer inspect runs/mine --strict
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_PATH",
        help="hub name, folder of a model, a run or an adapter, or .gguf file",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an eligible site is refused"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the model's own code from the hub"
    )


def main(options: argparse.Namespace) -> int:
    """Print what would be swapped in a model, from its configuration alone."""
    from liger_trainer.injection.walk import inject
    from liger_trainer.runs.checks import require_for_model
    from liger_trainer.runs.load import ModelArguments, meta_model

    path = Path(options.model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        plan = f"`liger-trainer train {options.model} --dry-run`"
        raise ValueError(f"inspect takes a model, not a recipe; {plan} shows what a recipe swaps")
    if path.suffix == ".gguf":
        model = ModelArguments(str(path.parent), gguf_file=path.name)
    else:
        name = str(path) if options.model.startswith("~") else options.model
        model = ModelArguments(name, trust_remote_code=options.trust_remote_code)
    require_for_model(model)
    report = inject(meta_model(model))
    print(report.to_json() if options.json else report)
    refused = sum(eligible - swapped for swapped, eligible in report.coverage.values())
    if options.strict and refused:
        print(f"error: {refused} eligible sites would not be swapped", file=sys.stderr)
        return 1
    return 0
