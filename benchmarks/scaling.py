"""Scaling over GPUs: python benchmarks/scaling.py --json scaling.json

Forward, backward and fused AdamW of a random model in bf16, every layer checkpointed. LoRA: rank 16
on every linear layer, fp32 adapters. On each of 1, 2, 4, 8 GPUs, as many as there are:

    fsdp2       weights shared out, one sequence of the named length on each GPU
    zero3       the same by DeepSpeed
    fsdp2+cp    weights shared out, one sequence in all, its tokens shared out (context parallel)

Each cell: efficiency (tokens/s of a GPU against the fewest GPUs that ran), tokens per second and
GPU, the largest peak GiB of a rank, and how long communication kernels run as a share of the step.
They overlap with computation, and wait for the slowest rank.

    python benchmarks/scaling.py --case "llama-8b full" --engine fsdp2 --variant off liger-trainer
    python benchmarks/scaling.py --smoke --worlds 1 2          # a tiny model on the CPU, by gloo

Every cell has processes of its own, started by torch.distributed.run. `--json FILE` keeps the
results, adds to those of earlier calls, and draws FILE.png beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from timing import add_case_option, chosen_cases, environment, print_table

CASES = {
    f"{shape} {what}, {length}": (shape, what, length)
    for shape, what, length in itertools.product(
        ("llama-1b", "llama-8b", "qwen3-8b"), ("full", "LoRA"), (4096, 32768)
    )
}
SMOKE = {"tiny full, 64": ("tiny", "full", 64), "tiny LoRA, 64": ("tiny", "LoRA", 64)}
ENGINES = {"fsdp2": None, "zero3": "deepspeed", "fsdp2+cp": None}  # and what each needs
VARIANTS = {"off": None, "liger-kernel": "liger_kernel", "liger-trainer": None}
TOLERANCE = 0.02  # relative, of the loss after the warm-up


def launch(name: str, engine: str, variant: str, world: int, limit: float) -> dict:
    """Return the result of a group of `world` processes, or why there is none."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={world}", str(Path(__file__).with_name("scaling_step.py"))),
        *(map(str, (CASES | SMOKE)[name])),
        *(engine, variant),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failure": "too slow"}
    line = next((t for t in done.stdout.splitlines() if t.startswith("{")), None)
    if done.returncode == 0 and line:
        return json.loads(line)
    errors = re.findall(r"^(?:\[rank\d+\]: ?)?(\S*Error\b.*)", done.stderr, re.M)
    return {"failure": (errors or done.stderr.strip().splitlines() or ["no output"])[0][:90]}


def tokens_per_second(key: str, world: int, found: dict) -> float:
    """Return the tokens per second of one GPU."""
    name, engine, _ = key.split(" | ")
    length = (CASES | SMOKE)[name][2]
    return 1000 * length / found["ms"] / (world if engine == "fsdp2+cp" else 1)


def cell(key: str, groups: dict[str, dict], world: int, off: dict[str, dict]) -> str:
    """Return a table cell: a group's figures, relative to those of the fewest GPUs that ran."""
    found = groups.get(str(world))
    if found is None or "failure" in found:
        return "" if found is None else found["failure"]
    other = off.get(str(world), {}).get("loss", found["loss"])
    if abs(found["loss"] - other) > TOLERANCE * abs(other):
        return f"another result: loss {found['loss']:.4f}, not {other:.4f}"
    fewest = min(int(w) for w, g in groups.items() if "ms" in g)
    first = tokens_per_second(key, fewest, groups[str(fewest)])
    speed = tokens_per_second(key, world, found)
    return (
        f"{speed / first:.2f}, {speed:,.0f} tok/s, "
        f"{max(found['gib']):.1f} GiB, {found['communication']:.0%}"
    )


def plot(results: dict[str, dict], path: Path) -> None:
    """Plot tokens per second and GPU over the number of GPUs, a panel for each case and engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({key.rpartition(" | ")[0] for key in results})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for variant in VARIANTS:
            groups = results.get(f"{panel} | {variant}", {})
            key = f"{panel} | {variant}"
            points = sorted(
                (int(w), tokens_per_second(key, int(w), g)) for w, g in groups.items() if "ms" in g
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(title=panel.replace(" | ", ", "), xlabel="GPUs", ylabel="tokens/s per GPU")
        axis.set_xscale("log", base=2)
        worlds = sorted({int(w) for v in VARIANTS for w in results.get(f"{panel} | {v}", {})})
        axis.set_xticks(worlds, worlds)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--engine", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--variant", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--worlds", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--limit", type=float, default=300, help="seconds that a group may take")
    parser.add_argument("--json", type=Path, help="file that keeps all results")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("needs CUDA devices; --smoke runs without any")
    return options


def main():
    options = parsed()
    cases = SMOKE if options.smoke else CASES
    most = max(options.worlds) if options.smoke else torch.cuda.device_count()
    results = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["results"]
    chosen = chosen_cases(cases, options.case)
    for name, engine, variant in itertools.product(chosen, options.engine, options.variant):
        needed = [p for p in (ENGINES[engine], VARIANTS[variant]) if p]
        missing = [p for p in needed if importlib.util.find_spec(p) is None]
        if missing:
            print(f"{name}, {engine}, {variant}: skipped, {missing[0]} is not installed")
            continue
        if options.smoke and engine == "fsdp2+cp":
            print(f"{name}, {engine}, {variant}: skipped, attention over ranks needs CUDA")
            continue
        groups = results.setdefault(f"{name} | {engine} | {variant}", {})
        for world in sorted(w for w in options.worlds if w <= most):
            groups[str(world)] = launch(name, engine, variant, world, options.limit)
            print(name, engine, variant, world, groups[str(world)], flush=True)
            if options.json:
                kept = {"environment": environment(), "results": results}
                options.json.write_text(json.dumps(kept, indent=1))
    print(environment())
    worlds = sorted({int(w) for groups in results.values() for w in groups})
    rows = []
    for key, groups in results.items():
        name, engine, _ = key.split(" | ")
        off = results.get(f"{name} | {engine} | off", {})
        rows.append(
            [
                key.replace(" | ", ", "),
                *(cell(key, groups, w, off) for w in worlds),
            ]
        )
    print_table("Scaling", ["case", *(f"{w} GPUs" for w in worlds)], rows)
    if options.json and results:
        plot(results, options.json.with_suffix(".png"))
    if options.smoke and any("tok/s" not in c for row in rows for c in row[1:] if c):
        raise SystemExit("a group failed or trains something else")


if __name__ == "__main__":
    main()
