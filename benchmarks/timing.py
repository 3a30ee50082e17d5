"""What the benchmarks share: cases by name, timing on a CUDA device, the machine, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Iterable

import torch


def add_case_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", nargs="*", default=[""], help="names of cases, or parts of names")


def chosen_cases(cases: Iterable[str], parts: Iterable[str]) -> list[str]:
    """Return the cases of these names, and for any other text those whose names contain it.

    Raises SystemExit for a text that no name contains.
    """
    names = list(cases)
    for part in parts:
        if not any(part in name for name in names):
            raise SystemExit(f"no case has {part!r} in its name; there are: " + "; ".join(names))
    return [n for n in names if any(p == n if p in names else p in n for p in parts)]


def measure(fn: Callable[[], object], *, warmup: int = 3, repeats: int = 12) -> tuple[float, float]:
    """Return (median milliseconds, peak MiB above what was allocated before) of `fn()`."""
    for _ in range(warmup):
        fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return statistics.median(a.elapsed_time(b) for a, b in times), peak


def measure_graph(fn: Callable[[], object], *, warmup: int = 3, repeats: int = 30) -> float:
    """Median milliseconds of replays of a CUDA graph of `fn()`: device time alone.

    Raises RuntimeError if `fn` cannot be captured (it synchronizes, say).
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            fn()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            fn()
    return measure(graph.replay, warmup=warmup, repeats=repeats)[0]


def environment() -> str:
    """Return one line about the machine and versions with which a table was measured."""
    versions = []
    for name in ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}; " + ", ".join(versions)


def print_table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """Print a GitHub-flavored table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [f"{c:.3g}" if isinstance(c, float) and c < 1000 else
                 f"{c:.0f}" if isinstance(c, float) else str(c) for c in row]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
