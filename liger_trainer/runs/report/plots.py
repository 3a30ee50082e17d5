"""The figures of a run's report, as inline SVG. A leaf."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea580c", "#16a34a", "#dc2626", "#64748b"
SOLID, DASHED = "-", "--"

_UNIT = re.compile(r"\((nats[^)]*|tokens|GiB)\)")

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """A figure of one or more keys of the log, each for training and held-out data."""

    name: str
    keys: tuple[tuple[str, str], ...]  # (key, its name in the legend; empty if it is the only one)
    from_zero: bool = False
    limits: tuple[float, float] | None = None

    @property
    def unit(self) -> str:
        """What the vertical axis shows: the unit in the name, or the quantity itself."""
        unit = _UNIT.search(self.name)
        if self.limits:
            return "share"
        return unit[1] if unit else self.name.partition(" (")[0].lower()


_LIKELIHOOD = Chart("Loss (nats per token)", (("loss", ""),))
_CHARTS = (
    Chart("Loss", (("loss", ""),)),
    Chart("Reward", (("reward", ""),)),
    Chart("Reward margin (chosen - rejected)", (("rewards/margins", ""),)),
    Chart(
        "Share of pairs with the higher reward on chosen",
        (("rewards/accuracies", ""),),
        limits=(0, 1.02),
    ),
    Chart("Rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Chart("Margin of scores (chosen - rejected)", (("margin", ""),)),
    Chart("Share of pairs with the higher score on chosen", (("accuracy", ""),), limits=(0, 1.02)),
    Chart("Scores", (("max_reward", "most"), ("mean_reward", "mean"), ("min_reward", "least"))),
    Chart(
        "Log-probability of completions (nats)",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
    ),
    Chart("KL to the reference (nats)", (("kl", ""),)),
    Chart("Entropy (nats per token)", (("entropy", ""),), from_zero=True),
    Chart("Likelihood loss of chosen (nats per token)", (("nll_loss", ""),)),
    Chart("Log odds, chosen over rejected", (("log_odds_chosen", ""),)),
    Chart("Reward, standard deviation", (("reward_std", ""),), from_zero=True),
    Chart("Groups whose rewards are all equal", (("frac_reward_zero_std", ""),), limits=(0, 1.02)),
    Chart("Completion length (tokens)", (("completions/mean_length", ""),), from_zero=True),
    Chart("Share of completions cut off", (("completions/clipped_ratio", ""),), limits=(0, 1.02)),
)
_RUN_CHARTS = (
    Chart("Gradient norm", (("grad_norm", ""),), from_zero=True),
    Chart("Learning rate", (("learning_rate", ""),), from_zero=True),
    Chart("Tokens per second", (("tokens_per_second", ""),), from_zero=True),
    Chart("Peak memory (GiB)", (("peak_memory_gib", ""),), from_zero=True),
)
_REWARD_FUNCTION = re.compile(r"rewards/(.+)/mean")


def plots(log_history: list[dict[str, Any]]) -> list[str]:
    """Return SVG figures of the loss, rewards, margins, accuracies, KL, entropy and speed, in that
    order, as far as they were logged."""
    keys = {key for entry in log_history for key in entry}
    functions = sorted(m[1] for m in map(_REWARD_FUNCTION.fullmatch, keys) if m)
    rewards = tuple(Chart(f"Reward: {f}", ((f"rewards/{f}/mean", ""),)) for f in functions)
    charts = (*_CHARTS, *rewards, *_RUN_CHARTS)
    if not any("reward" in key for key in keys):
        charts = (_LIKELIHOOD, *charts[1:])
    figures = []
    for chart in charts:
        lines = list(_lines(chart, log_history))
        if lines:
            figures.append(f"<figure>{_plot(chart, lines)}</figure>")
    return figures


def _lines(chart: Chart, log_history: list[dict[str, Any]]):
    """Yield `(points, label, color, style)` of each line in the chart that was logged.

    Held-out lines are dashed; a color stands for a key, or for the split if there is one key.
    """
    has_held_out = any(_series(log_history, f"eval_{key}") for key, _ in chart.keys)
    for (key, name), color in zip(chart.keys, (BLUE, RED, GREEN), strict=False):
        held_out = color if name else ORANGE
        for prefix, split, line in (
            ("", "training", (color, SOLID)),
            ("eval_", "held out", (held_out, DASHED)),
        ):
            points = _series(log_history, prefix + key)
            words = [name, split if has_held_out else ""]
            if points:
                yield points, ", ".join(filter(None, words)), *line


def _series(log_history: list[dict[str, Any]], key: str) -> Points:
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def _plot(chart: Chart, lines: list[tuple[Points, str, str, str]]) -> str:
    """Return a line chart over optimizer steps, as inline SVG with unique ids."""
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for points, label, color, style in lines:
        marker = "o" if len(points) < 30 else None
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=color, label=label, marker=marker, markersize=4)
    axes.set_title(chart.name, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step", color=GREY)
    axes.set_ylabel(chart.unit, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e2e8f0")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, length=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    if chart.limits:
        axes.set_ylim(*chart.limits)
    elif chart.from_zero:
        heights = [y for points, *_ in lines for _, y in points if math.isfinite(y)]
        axes.set_ylim(0, 1.1 * max(heights, default=0) or None)  # room above a level line
    if any(label for _, label, *_ in lines):  # below the axes, where it hides no line
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": chart.name, "svg.fonttype": "path"}):
        nameless = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nameless)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration
