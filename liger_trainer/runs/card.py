"""The model card of a run: base model, training and results."""

from __future__ import annotations

import yaml

from liger_trainer.runs.finished import FinishedRun
from liger_trainer.runs.report.summary import headline_metrics, machine


def model_card(run: FinishedRun) -> str:
    """Return the model card in Markdown, with the metadata that a hub reads."""
    base = run.record["base"].get("name_or_path") or run.record["base"].get("package")
    method, summary = run.recipe.method, run.record["summary"]
    front = {
        "base_model": base,
        "library_name": "peft" if run.is_adapter else "transformers",
        "tags": ["liger-trainer", method],
    }
    rows = "\n".join(f"| {n} | {b} | {a} |" for n, b, a in headline_metrics(summary["held_out"]))
    versions = ", ".join(f"{k} {v}" for k, v in machine().items() if k not in ("Device", "Python"))
    recipe = yaml.safe_dump(run.record["recipe"], sort_keys=False).rstrip()
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.path.resolve().name}",
        f"{base}, trained by {method} with liger-trainer: {summary['steps']:,} steps, "
        f"{summary['tokens']:,} tokens.",
        f"| held out | before | after |\n|---|---|---|\n{rows}" if rows else "",
        f"Begun {run.record['started']}.\n\n```bash\n{run.record['command']}\n```",
        f"```yaml\n{recipe}\n```",
        f"{versions}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
