"""Run summary: numbers from the trainer's log and from the machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from liger_trainer.runs.throughput import peak_memory_gib

_REPORTED_PACKAGES = (
    "liger-trainer",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "trl",
)
# Headline metrics: key, display name, format.
_HEADLINE_METRICS = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("rewards/margins", "reward margin", "{:.3f}"),
    ("rewards/accuracies", "reward accuracy", "{:.0%}"),
    ("margin", "margin of scores", "{:.3f}"),
    ("accuracy", "accuracy", "{:.0%}"),
    ("kl", "KL", "{:.4f}"),
)
# Numbers that every evaluation logs besides its metrics.
_NOT_METRICS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "num_tokens",
    "model_preparation_time",
)


def summarize(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return training and held-out metrics, mean tokens per second, peak memory.

    `training` maps each headline metric to its first and last value, `held_out` every metric,
    without `eval_`.
    """
    train = [e for e in log_history if "tokens_per_second" in e]
    found: dict[str, Any] = {
        "training": {
            key: [train[0][key], train[-1][key]]
            for key, *_ in _HEADLINE_METRICS
            if train and key in train[0] and key in train[-1]
        }
    }
    metrics = held_out(log_history)
    if "loss" in metrics:
        before, after = metrics["loss"]
        found |= {"eval_loss_before": before, "eval_loss_after": after}
    tokens = sum(e["tokens"] for e in train)
    seconds = sum(e["tokens"] / e["tokens_per_second"] for e in train if e["tokens_per_second"])
    return found | {
        "held_out": metrics,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_gib": max([peak_memory_gib(), *(e["peak_memory_gib"] for e in train)]),
    }


def machine() -> dict[str, str]:
    """Return versions and hardware, for the report."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    facts = {"Device": device, "Python": platform.python_version()}
    return facts | {package: version_of(package) for package in _REPORTED_PACKAGES}


def engine_told(summary: dict[str, Any]) -> str:
    """Return the number of processes and what they share, for people."""
    alone = summary["engine"] == "NO"  # accelerate's word for a single process
    return "1" if alone else f"{summary['processes']}, {summary['engine']}"


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def held_out(log_history: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return the first and last value of each evaluation metric, without `eval_`.

    Of a single evaluation, one of the two is None: the last if it was before training.
    """
    found: dict[str, list[tuple[int | None, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if name != key and name not in _NOT_METRICS and isinstance(value, (int, float)):
                found.setdefault(name, []).append((entry.get("step"), value))
    return {name: _ends(values) for name, values in found.items()}


def _ends(values: list[tuple[int | None, float]]) -> list[float | None]:
    """Return the first and last of values that were measured after some steps."""
    (step, first), (_, last) = values[0], values[-1]
    if len(values) == 1:
        return [first, None] if step == 0 else [None, last]
    return [first, last]


def headline_metrics(metrics: dict[str, list[float | None]]) -> list[tuple[str, str, str]]:
    """Return name, first and last value of the headline ones among `metrics`, formatted; "-" if it
    was not measured."""
    found = []
    for key, name, text in _HEADLINE_METRICS:
        # If there is a reward, the loss is a policy gradient's, which is near 0 at any quality.
        if key in metrics and not (key == "loss" and "reward" in metrics):
            first, last = ("-" if v is None else text.format(v) for v in metrics[key])
            found.append((name, first, last))
    return found
