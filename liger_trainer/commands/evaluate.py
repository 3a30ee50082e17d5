"""`liger-trainer evaluate`: the held-out metrics of a run's model."""

from __future__ import annotations

import argparse
import json

from liger_trainer.commands.train import add_overrides

HELP = "compute held-out metrics of a run's model, with the run's recipe"
EXAMPLES = """examples:
  liger-trainer evaluate runs/smollm2-135m
  liger-trainer evaluate runs/mine data.path=other.jsonl data.eval_fraction=0.5 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    add_overrides(parser, "overrides the run's value")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def main(options: argparse.Namespace) -> int:
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
