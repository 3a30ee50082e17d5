"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import yaml

from liger_trainer.runs.plots import plots
from liger_trainer.runs.summary import telling

_STYLE = """
:root { color-scheme: light; --line: #e2e8f0; --soft: #64748b; --ink: #0f172a; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: #f8fafc; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p.sub { color: var(--soft); margin: 0 0 24px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; }
.card, figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.card span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px; }
figure svg { width: 100%; height: auto; display: block; }
.box { overflow: auto; max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 14px; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: #f1f5f9; font-weight: 600; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 8px; }
tr.no td { background: #fff7ed; }
.texts td { white-space: pre-wrap; vertical-align: top; font-size: 13px; min-width: 180px; }
pre { margin: 0; padding: 14px 16px; font-size: 13px; line-height: 1.5; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
"""


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, Any],
    log_history: list[dict[str, Any]],
    injection: dict[str, Any] | None,
    recipe: dict[str, Any],
    machine: dict[str, str],
    notes: list[str],
    samples: list[dict[str, Any]] = (),
) -> Path:
    """Write the page and return its path.

    Args:
        summary: `held_out`, `tokens_per_second`, `peak_memory_gib`, ... as `summarize` has them,
            with `steps` and `minutes`.
        log_history: the trainer's log, with `tokens_per_second` and `peak_memory_gib`.
        injection: the report's JSON, parsed, with its grouped `table`; None with the flag off.
        recipe: the recipe's nested values.
        samples: held-out examples: `prompt`, `expected`, and the completions `before` and `after`.
    """
    sections = [
        f"<h1>{html.escape(title)}</h1><p class=sub>{html.escape('; '.join(notes))}</p>",
        _cards(summary),
        "<h2>Training</h2>",
        f"<div class=plots>{''.join(plots(log_history))}</div>",
        *_samples(samples),
        "<h2>Injection</h2>",
        _injection(injection),
        "<h2>Recipe</h2>",
        f"<div class=box><pre>{html.escape(yaml.safe_dump(recipe, sort_keys=False))}</pre></div>",
        "<h2>Versions and machine</h2>",
        _table(["What", "Value"], [[k, v] for k, v in machine.items()]),
    ]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    viewport = '<meta name=viewport content="width=device-width, initial-scale=1">'
    body = "\n".join(sections)
    page = (
        f"<!doctype html>\n<html lang=en><head>{head}{viewport}</head>\n<body><main>{body}</main>"
    )
    path.write_text(page + "</body></html>\n", encoding="utf-8")
    return path


def _cards(summary: dict[str, Any]) -> str:
    cards = [
        *((f"{first} → {last}", f"held-out {name}") for name, first, last in telling(summary)),
        (f"{summary['tokens_per_second']:,.0f}", "tokens per second")
        if summary.get("tokens_per_second")
        else None,
        (f"{summary['peak_memory_gib']:.2f} GiB", "peak memory"),
        (f"{summary['steps']:,}", "optimizer steps"),
        (f"{summary['minutes']:.1f} min", "from start to end"),
    ]
    tiles = "".join(
        f"<div class=card><b>{b}</b><span>{s}</span></div>" for b, s in filter(None, cards)
    )
    return f"<div class=cards>{tiles}</div>"


def _samples(samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    keys = ("prompt", "expected", "before", "after")
    rows = [[sample.get(key, "") for key in keys] for sample in samples]
    columns = ["prompt", "in the data", "before training", "after training"]
    return ["<h2>Held-out completions</h2>", _table(columns, rows, kind="texts")]


def _injection(injection: dict[str, Any] | None) -> str:
    if injection is None:
        return "<p>use_liger_kernel is off: the model ran as it is.</p>"
    coverage = ", ".join(
        f"{rule} {c['swapped']} of {c['eligible']}" for rule, c in injection["coverage"].items()
    )
    columns, *lines = injection["table"]
    every = [
        [
            row["site"],
            row["rule"],
            "yes" if row["swapped"] else "no",
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
            row["reason"],
        ]
        for row in injection["rows"]
    ]
    sites = _table(["site", "rule", "swapped", "max error", "reason"], every)
    return (
        f"<p>Swapped of what is eligible: {html.escape(coverage) or 'nothing to swap'}.</p>"
        + _table(columns, lines)
        + f"<details><summary>All {len(every)} sites</summary>{sites}</details>"
    )


def _table(columns: list[str], rows: list[list[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in row)
        body += f"<tr class=no>{cells}</tr>" if "no" in row and not kind else f"<tr>{cells}</tr>"
    return (
        f'<div class="box {kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
