"""`liger-trainer launch`: a recipe in several processes, through `accelerate launch`."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from liger_trainer.commands import train
from liger_trainer.runs.errors import INTERRUPTED, RunError
from liger_trainer.runs.secrets import hidden_override

# Seconds that a signal leaves the processes to finish a step and save; torch's own limit is 30.
_LAST_SAVE = 600

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
    parser.add_argument(
        "--processes", type=int, required=True, metavar="N", help="number of processes, one per GPU"
    )
    accelerate = parser.add_argument(
        "--accelerate",
        default="ddp",
        metavar="NAME_OR_FILE",
        help="configuration: ddp, fsdp2, zero2, zero3, tensor_parallel, context_parallel, "
        "sequence_parallel, or a file from `accelerate config` (default: %(default)s)",
    )
    accelerate.completer = _configurations  # pyright: ignore[reportAttributeAccessIssue] (of argcomplete)


def _configurations(prefix: str, **_) -> list[str]:
    """For completion in the shell."""
    from liger_trainer.runs.shipped import accelerate_names

    return train.completions(prefix, accelerate_names())


def main(options: argparse.Namespace) -> int:
    """Check the recipe, start the processes through accelerate, and wait for them."""
    if options.dry_run:
        return train.main(options)
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from liger_trainer.runs import folder
    from liger_trainer.runs.checks import require
    from liger_trainer.runs.recipe.recipe import load_recipe

    words = command(options)
    recipe = load_recipe(options.recipe, options.overrides)
    require(recipe)
    output, earlier = recipe.output_dir, folder.read(recipe.output_dir)
    sys.stdout.flush()
    sys.stderr.flush()
    # Ctrl-C reaches the processes too, which save a checkpoint: this one waits for them.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_LAST_SAVE))
    # The processes say themselves what has happened to them.
    for part in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended(rank, failure.exitcode)
    except subprocess.CalledProcessError as error:  # one process, or DeepSpeed's launcher
        return _ended(0, error.returncode)
    except SignalException:
        left = psutil.Process().children(recursive=True)
        for process in left:
            process.kill()  # a third signal has interrupted torch, too, while it waited for them
        found = folder.read(output)
        if left or found is None or found == earlier or found["state"] != "finished":
            return INTERRUPTED
        return bool(found["warnings"])  # a signal in the final evaluation: the run is complete
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def _ended(rank: int, code: int) -> int:
    """Return the exit code of a process that failed. It has said why, unless it was killed."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    raise RunError(f"process {rank} was ended by {name}{hint}")


def command(options: argparse.Namespace) -> list[str]:
    """Return the words of the `accelerate launch` command. Raises ValueError for wrong options."""
    import torch

    if options.processes < 1:
        raise ValueError(f"--processes is {options.processes}; it must be at least 1")
    if torch.cuda.is_available() and options.processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes is {options.processes}, and there are {torch.cuda.device_count()} GPUs"
        )
    configuration = _configuration(options.accelerate)
    _check_engine(options.accelerate, configuration)
    flags = [f"--{name}" for name in ("resume", "overwrite", "debug") if getattr(options, name)]
    started = ["liger-trainer", "launch", options.recipe]
    started += map(hidden_override, options.overrides)
    started += ["--processes", str(options.processes), "--accelerate", options.accelerate]
    return [
        *("--config_file", configuration),
        *("--num_processes", str(options.processes)),
        *("-m", "liger_trainer"),
        *("train", options.recipe, *options.overrides, *flags, "--command", shlex.join(started)),
    ]


def _check_engine(name: str, configuration: str) -> None:
    """Raise ValueError for an engine whose package or hardware is missing."""
    import torch

    from liger_trainer.runs import packages
    from liger_trainer.runs.files import read_text
    from liger_trainer.runs.recipe.parse import parse

    try:
        values = parse(read_text(Path(configuration)))  # or JSON, which is YAML as well
    except ValueError as error:
        raise ValueError(f"--accelerate: {name} cannot be read: {error}") from error
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ValueError(
            f"--accelerate: {name} is no configuration of accelerate: it has no distributed_type"
        )
    engine = values["distributed_type"]
    if engine == "DEEPSPEED" and not packages.installed("deepspeed"):
        raise ValueError(f"--accelerate: {name} needs DeepSpeed: `pip install deepspeed`")
    replicated = engine in ("NO", "MULTI_CPU", "MULTI_GPU", None)
    if replicated and not values.get("parallelism_config"):
        return
    if not torch.accelerator.is_available():
        raise ValueError(f"--accelerate: {name} needs GPUs, and there are none here; use ddp")


def _configuration(name: str) -> str:
    from liger_trainer.runs.shipped import accelerate_names, shipped

    if name in accelerate_names():
        return str(shipped(f"accelerate/{name}.yaml"))
    if os.path.isfile(name):
        return name
    raise ValueError(
        f"--accelerate: {name!r} is neither a file nor one of {', '.join(accelerate_names())}"
    )
