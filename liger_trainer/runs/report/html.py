"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml

from liger_trainer.report import InjectionReport, Row
from liger_trainer.runs.report.plots import plots
from liger_trainer.runs.report.samples import NEW_TOKENS
from liger_trainer.runs.report.summary import headline_metrics

_PAGE = """<!doctype html>
<html lang=en>
<head><meta charset=utf-8><title>{{ title }}</title>
<meta name=viewport content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #e2e8f0; --soft: #64748b; --ink: #0f172a;
  --page: #f8fafc; --box: #fff; --head: #f1f5f9; --refused: #fff7ed; }
@media (prefers-color-scheme: dark) {
  :root { --line: #334155; --soft: #94a3b8; --ink: #e2e8f0; --page: #0f172a; --box: #172033;
    --head: #1e293b; --refused: #43281c; }
  figure svg { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--page); margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
.sub { color: var(--soft); margin: 0 0 4px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin-top: 24px; }
.card, figure, .box { background: var(--box); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; color: inherit; text-decoration: none; }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.card span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px; }
figure svg { width: 100%; height: auto; display: block; }
.box { overflow: auto; max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 14px; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--head); font-weight: 600; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 8px; }
tr.no td { background: var(--refused); }
.texts td { white-space: pre-wrap; vertical-align: top; font-size: 13px; min-width: 180px; }
pre { margin: 0; padding: 14px 16px; font-size: 13px; line-height: 1.5; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
</style></head>
{% macro table(columns, rows, kind="") %}
<div class="box {{ kind }}"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if "no" in row and not kind %} class=no{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}

</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<body><main>
<h1>{{ title }}</h1>
{% if command %}
<p class=sub><code>{{ command }}</code></p>
{% endif %}
{% for note in notes %}
<p class=sub>{{ note }}</p>
{% endfor %}
<div class=cards>
{% for value, name in cards %}
<div class=card><b>{{ value }}</b><span>{{ name }}</span></div>
{% endfor %}
<a class=card href="#injection"><b>{{ swapped }}</b><span>places run on kernels</span></a>
</div>
<h2>Training</h2>
<div class=plots>{% for figure in figures %}{{ figure | safe }}{% endfor %}</div>
{% if samples %}
<h2>Held-out completions</h2>
<p>Decoded greedily, at most {{ new_tokens }} tokens each.</p>
{{ table(["prompt", "in the data", "before training", "after training"], samples, "texts") }}
{% endif %}
<h2 id=injection>Injection</h2>
{% if injection is none %}
<p>use_liger_kernel is off: the model ran as it is.</p>
{% else %}
<p>Swapped of what is eligible:
{% for rule, count in injection.coverage.items() %}
{{ rule }} {{ count.swapped }} of {{ count.eligible }}{{ "." if loop.last else "," }}
{% else %}
nothing to swap.
{% endfor %}
</p>
<p>A rule is a kind of module that a kernel can compute. "Max error" is the largest difference
between kernel and original in fp32, over outputs and gradients, relative to the largest value.
Places that do not say "yes" run the model's own code: "no" where a kernel was to be expected, "n/a"
where none is, "off" where it is switched off.</p>
{% set grouped = injection.table() %}
{{ table(grouped[0], grouped[1:]) }}
<details><summary>All {{ sites | length }} sites</summary>
{{ table(["site", "rule", "swapped", "max error", "reason"], sites) }}
</details>
{% endif %}
<h2>Recipe</h2>
<div class=box><pre>{{ recipe }}</pre></div>
<h2>Versions and machine</h2>
{{ table(["what", "value"], machine.items()) }}
</main></body></html>
"""


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, Any],
    log_history: list[dict[str, Any]],
    injection: InjectionReport | None,
    recipe: dict[str, Any],
    machine: dict[str, str],
    notes: list[str],
    command: str | None = None,
    samples: list[dict[str, Any]] = (),
) -> Path:
    """Write the page and return its path.

    Args:
        title: the heading of the page.
        summary: `held_out`, `tokens_per_second`, `peak_memory_gib`, ... as `summarize` returns
            them, with `steps` and `minutes`.
        log_history: the trainer's log, with `tokens_per_second` and `peak_memory_gib`.
        injection: the injection report; None if the flag is off.
        recipe: the recipe's nested values.
        machine: versions and hardware.
        notes: sentences below the heading.
        command: the command that started the run.
        samples: held-out examples: `prompt`, `expected`, and the completions `before` and `after`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_PAGE).render(
        title=title,
        notes=notes,
        command=command,
        cards=_cards(summary),
        figures=plots(log_history),
        new_tokens=NEW_TOKENS,
        samples=[
            [sample.get(key, "") for key in ("prompt", "expected", "before", "after")]
            for sample in samples
        ],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        machine=machine,
        injection=injection,
        swapped=_swapped(injection),
        sites=[_site(row) for row in injection.rows] if injection else [],
    )
    path.write_text(page + "\n", encoding="utf-8")
    return path


def _cards(summary: dict[str, Any]) -> list[tuple[str, str]]:
    speed = summary.get("tokens_per_second")
    split = "held-out" if summary["held_out"] else "training"
    metrics = summary["held_out"] or summary["training"]
    return [
        *(
            (f"{first} → {last}", f"{split} {name}")
            for name, first, last in headline_metrics(metrics)
        ),
        *([(f"{speed:,.0f}", "tokens per second")] if speed else []),
        (f"{summary['peak_memory_gib']:.2f} GiB", "peak memory"),
        (f"{summary['steps']:,}", "optimizer steps"),
        (f"{summary['minutes']:.1f} min", "from start to end"),
    ]


def _swapped(injection: InjectionReport | None) -> str:
    if injection is None:
        return "none"
    eligible = [row for row in injection.rows if row.eligible]
    return f"{sum(row.swapped for row in eligible)} of {len(eligible)}"


def _site(row: Row) -> tuple[str, ...]:
    error = "" if row.max_error is None else f"{row.max_error:.1e}"
    return row.site, row.rule, row.answer, error, row.reason
