"""`liger-trainer launch`: a recipe in several processes, through `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import sys

from liger_trainer.commands import train

HELP = "train in several processes, through accelerate"
EXAMPLES = """examples:
  liger-trainer launch sft/qwen3-8b-full --processes 4 --accelerate fsdp2
  liger-trainer launch mine.yaml --processes 2 training.learning_rate=1e-5
  liger-trainer launch mine.yaml --processes 8 --accelerate my_accelerate.yaml --resume

`accelerate launch -m liger_trainer train mine.yaml` and `torchrun -m liger_trainer train mine.yaml`
work as well.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    train.add_arguments(parser)
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="one per GPU")
    parser.add_argument(
        "--accelerate",
        default="ddp",
        metavar="NAME_OR_FILE",
        help="configuration: ddp, fsdp2, zero2, zero3, tensor_parallel, context_parallel, "
        "sequence_parallel, or a file from `accelerate config` (default: %(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Check the recipe, and become `accelerate launch`."""
    if options.dry_run:
        return train.main(options)
    words = command(options)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(words[0], words)


def command(options: argparse.Namespace) -> list[str]:
    """Return the words of the `accelerate launch` command. Raises ValueError for wrong options."""
    import torch

    from liger_trainer.runs.checks import require
    from liger_trainer.runs.recipe import load_recipe

    if options.processes < 1:
        raise ValueError(f"--processes is {options.processes}; it must be at least 1")
    if torch.cuda.is_available() and options.processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes is {options.processes}, and there are {torch.cuda.device_count()} GPUs"
        )
    configuration = _configuration(options.accelerate)
    require(load_recipe(options.recipe, options.overrides))
    flags = [f"--{name}" for name in ("resume", "overwrite", "debug") if getattr(options, name)]
    return [
        sys.executable,
        *("-m", "accelerate.commands.launch"),
        *("--config_file", configuration),
        *("--num_processes", str(options.processes)),
        *("-m", "liger_trainer"),
        *("train", options.recipe, *options.overrides, *flags),
    ]


def _configuration(name: str) -> str:
    from liger_trainer.runs.shipped import accelerate_names, shipped

    if name in accelerate_names():
        return str(shipped(f"accelerate/{name}.yaml"))
    if os.path.isfile(name):
        return name
    raise ValueError(
        f"--accelerate: {name!r} is neither a file nor one of {', '.join(accelerate_names())}"
    )
