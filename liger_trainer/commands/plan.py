"""`liger-trainer plan`: whether a recipe fits on N GPUs, before they are rented."""

from __future__ import annotations

import argparse
import math

from liger_trainer.commands import train
from liger_trainer.runs.planning.memory import ENGINES, GIB, Memory, Run, peak, usable
from liger_trainer.runs.planning.shapes import CONFIGS

HELP = "estimate memory and communication on N GPUs"
EXAMPLES = """examples:
  liger-trainer plan sft/llama-3.1-8b-full --gpus 8 --memory 80
  liger-trainer plan mine.yaml --gpus 64 --memory 80 --bandwidth 50
  liger-trainer plan sft/qwen3-8b-lora --shape qwen3-8b --gpus 1 --memory 24

Exit code 0: it fits; 1: it does not; 2: wrong input. "Planning a run" in the documentation gives
the formulas and compares them with measured steps.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    train.add_recipe(parser)
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=float, required=True, metavar="GiB", help="memory of each GPU"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, help="engine (default: ddp on one GPU, fsdp2 on several)"
    )
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help=f"a known size, in place of the model's configuration: {', '.join(CONFIGS)}",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/s",
        help="what one GPU can send; adds times and shares of the step",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=500.0,
        metavar="TFLOP/s",
        help="sustained throughput of one GPU, for times (default: %(default)g)",
    )


def main(options: argparse.Namespace) -> int:
    """Print memory and communication of a recipe's step per GPU, and whether it fits."""
    for name in ("gpus", "memory", "bandwidth", "tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be above 0")
    from liger_trainer.runs.planning.estimate import run_of
    from liger_trainer.runs.recipe.recipe import load_recipe

    engine = options.engine or ("fsdp2" if options.gpus > 1 else "ddp")
    run = run_of(
        load_recipe(options.recipe, options.overrides),
        gpus=options.gpus,
        memory=options.memory,
        engine=engine,
        shape=options.shape,
    )
    need = peak(run)
    _print_setting(run)
    _print_memory(run, need)
    _print_traffic(run, options.bandwidth, options.tflops)
    return _print_verdict(run, need)


def _print_setting(run: Run) -> None:
    w = run.weights
    batches = "micro-batches" if run.accumulation > 1 else "micro-batch"
    kept = "checkpointed" if run.checkpointing else ("lean" if run.lean else "keep")
    print(
        f"{run.gpus} x {run.memory:g} GiB, {run.engine}; {w.trained + w.frozen:,} parameters, "
        f"{w.trained:,} trained; {run.accumulation} {batches} of {run.tokens:,} tokens on a GPU, "
        f"activations {kept}\n"
    )


def _print_memory(run: Run, need: Memory) -> None:
    from liger_trainer.commands.console import print_table

    rows = [[name, f"{size / GIB:.2f}"] for name, size in need.parts.items() if size]
    rows.append([f"peak, at {need.moment}", f"{need.total / GIB:.2f}"])
    rows.append(["a GPU has, for tensors", f"{usable(run.memory) / GIB:.2f}"])
    print_table(["memory of a GPU", "GiB"], rows)


def _print_traffic(run: Run, bandwidth: float | None, tflops: float) -> None:
    from liger_trainer.commands.console import print_table
    from liger_trainer.runs.planning.traffic import flops, traffic

    if run.gpus == 1:
        return
    sent = {name: size for name, size in traffic(run).items() if size}
    sent["together"] = sum(sent.values())
    columns = ["sent by a GPU in a step", "GB"]
    rows = [[name, f"{size / 1e9:.2f}"] for name, size in sent.items()]
    if bandwidth:
        columns.append(f"s at {bandwidth:g} GB/s")
        for row, size in zip(rows, sent.values(), strict=True):
            row.append(f"{size / bandwidth / 1e9:.3f}")
    print()
    print_table(columns, rows)
    if bandwidth:
        moving, computing = sent["together"] / bandwidth / 1e9, flops(run) / tflops / 1e12
        print(
            f"computing {computing:.3f} s at {tflops:g} TFLOP/s; communication is "
            f"{moving / (moving + computing):.0%} of a step if none of it overlaps, and "
            f"{max(0.0, moving - computing) / max(moving, computing):.0%} if all can"
        )


def _print_verdict(run: Run, need: Memory) -> int:
    from liger_trainer.runs.planning.estimate import fits, ways_out

    numbers = f"{need.total / GIB:.1f} of {usable(run.memory) / GIB:.1f} GiB"
    print()
    if fits(run):
        print(f"fits: {numbers}")
        return 0
    ways = "; or ".join(ways_out(run)) or f"nothing on GPUs of {run.memory:g} GiB"
    print(f"does not fit: {numbers}; what would: {ways}")
    return 1
