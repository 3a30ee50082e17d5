"""Runs a recipe: data, model, trainer, and what is left behind: a model, `run.json`, a report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.build import build_trainer
from liger_trainer.runs.data import Prepared
from liger_trainer.runs.html import write_report
from liger_trainer.runs.recipe import Recipe
from liger_trainer.runs.summary import machine, summarize
from liger_trainer.runs.throughput import StopOnSignal


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `interrupted` tells that it stopped early, with a checkpoint."""

    output_dir: Path
    interrupted: bool
    summary: dict[str, Any]
    report: Path | None = None


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Trains as the recipe says.

    Raises ValueError for an output folder that holds another run, data that cannot be trained on,
    packing on a model that cannot separate sequences; FileNotFoundError for missing files.
    """
    started = time.perf_counter()
    args = recipe.training_arguments()
    with args.main_process_first(desc="output folder"):
        checkpoint = _claim(recipe, args, resume=resume, overwrite=overwrite)
    trainer, prepared = build_trainer(recipe, args)
    if trainer.injection_report is not None and trainer.is_world_process_zero():
        print(f"\n{trainer.injection_report}\n", flush=True)
    args.eval_on_start = prepared.eval is not None and checkpoint is None
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.watching():
        trainer.train(resume_from_checkpoint=checkpoint)
    interrupted = stop.received is not None and trainer.state.global_step < trainer.state.max_steps
    if not interrupted:
        if prepared.eval is not None and not _evaluated_now(trainer.state):
            trainer.evaluate()
        trainer.save_model()
    summary = summarize(trainer.state.log_history) | {
        "steps": trainer.state.global_step,
        "minutes": (time.perf_counter() - started) / 60,
    }
    report = None
    if trainer.is_world_process_zero():
        run_folder.write(recipe, "interrupted" if interrupted else "finished", summary=summary)
        if not interrupted:
            report = _report(recipe, trainer, prepared, summary)
    return RunResult(recipe.output_dir, interrupted, summary, report)


def _claim(recipe: Recipe, args, *, resume: bool, overwrite: bool) -> str | None:
    """Every process asks for the folder; the first one takes it, the others find it taken."""
    if args.process_index == 0:
        return run_folder.claim(recipe, resume=resume, overwrite=overwrite)
    return run_folder.get_last_checkpoint(str(recipe.output_dir)) if resume else None


def _evaluated_now(state) -> bool:
    """Whether the last evaluation was of the model as it is."""
    steps = [e["step"] for e in state.log_history if "eval_runtime" in e]
    return bool(steps) and steps[-1] == state.global_step


def _report(recipe: Recipe, trainer, prepared: Prepared, summary: dict[str, Any]) -> Path:
    injection = trainer.injection_report
    return write_report(
        recipe.output_dir / "report.html",
        title=f"{recipe.path.stem}: {recipe.model.label}",
        summary=summary,
        log_history=trainer.state.log_history,
        injection=injection and {"table": injection.table(), **json.loads(injection.to_json())},
        recipe=recipe.values,
        machine=machine(),
        notes=[f"{len(prepared.train)} training rows ({prepared.kind})", *prepared.notes],
    )
