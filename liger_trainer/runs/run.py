"""Run a recipe: data, model, trainer; and write its results: a model, `run.json`, a report."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from liger_trainer.injection.memory_budget import budget_of
from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.adapters import base_location
from liger_trainer.runs.build import build_trainer
from liger_trainer.runs.checkpoints import SAVE_ERRORS, guard_saves, resume_hint
from liger_trainer.runs.checks import require
from liger_trainer.runs.engine import engine_of, save_whole_model
from liger_trainer.runs.errors import RunError, reason
from liger_trainer.runs.folder import RunFolder, Start
from liger_trainer.runs.health import Health
from liger_trainer.runs.origin import origin
from liger_trainer.runs.recipe.recipe import Recipe
from liger_trainer.runs.report.html import write_report
from liger_trainer.runs.report.samples import complete, samples_of
from liger_trainer.runs.report.summary import engine_told, machine, summarize
from liger_trainer.runs.signals import EvaluationInterrupted, StopOnSignal, shield_workers
from liger_trainer.runs.throughput import Outline, peak_memory_gib, trained_parameters


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    `interrupted`: it stopped early, with a checkpoint. `warnings`: problems of the trained model.
    """

    output_dir: Path
    interrupted: bool
    summary: dict[str, Any]
    report: Path | None
    warnings: list[str]
    is_main: bool  # this process prints messages and writes files


def run(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, command: str = ""
) -> RunResult:
    """Train by a recipe, and return the result.

    Args:
        recipe: a checked recipe.
        resume: continue or extend the run in the output folder.
        overwrite: replace the run in the output folder.
        command: the command line, for the report.

    Raises, before the output folder is changed, ValueError for a folder that holds another run,
    data that cannot be trained on, invalid options and missing packages, and FileNotFoundError for
    missing files. Raises RunError if weights become NaN or the disk is full, and KeyboardInterrupt
    if interrupted twice.
    """
    require(recipe)
    args = recipe.training_arguments()
    with run_folder.shared(recipe, args, resume=resume, overwrite=overwrite) as (folder, start):
        return _Run(recipe, args, folder, start, command).go()


class _NoStepsLeft(Exception):  # noqa: N818 (it is not an error)
    """The checkpoint was saved after the last step, so nothing is left to train."""


class _FirstStep(TrainerCallback):
    """Refuse to train if no steps are left, and take over the folder after the first step."""

    def __init__(self, folder: RunFolder | None, start: Start):
        self.folder, self.start = folder, start

    def on_train_begin(self, args, state, control, **kwargs):
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)  # the folder was moved
        if self.start.checkpoint is None or state.global_step < state.max_steps:
            return
        if self.start.earlier.get("state") == "finished" or state.global_step > state.max_steps:
            raise ValueError(
                f"--resume: the run has done {state.global_step} steps, and this recipe asks for "
                f"{state.max_steps}: set a larger training.max_steps or num_train_epochs"
            )
        raise _NoStepsLeft

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Miss the metric before the first step, not after it: every run evaluates before."""
        wanted = args.metric_for_best_model
        if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            known = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise ValueError(f"training.metric_for_best_model: no metric {wanted!r} among {known}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.folder is not None:
            self.folder.begin()


class _Run:
    """One run, from the data to the report. `folder` is None except in the first process."""

    def __init__(self, recipe, args, folder: RunFolder | None, start: Start, command: str):
        self.recipe, self.args, self.folder, self.start = recipe, args, folder, start
        self.command = command
        self.started = time.perf_counter()
        self.stop, self.health = StopOnSignal(), Health()

    def go(self) -> RunResult:
        self._say(self.folder.notes if self.folder else ())
        if self.folder is None:
            datasets.disable_progress_bars()
            disable_progress_bar()
        self.trainer, self.prepared = build_trainer(self.recipe, self.args)
        self._prepare()
        with self.stop.watching():
            self._train()
            if self.health.diverged is not None:
                raise RunError(self._diverged())
            if not self.stop.stopped:
                self._save()
                self._evaluate()
        return self._finish(self.stop.stopped)

    def _prepare(self) -> None:
        trainer, args, start = self.trainer, self.args, self.start
        engine = engine_of(trainer.accelerator)
        if start.earlier.get("data", self.prepared.digest) != self.prepared.digest:
            raise ValueError(
                "--resume: the data is not what the run began with; put it back as it was, or "
                "start another run"
            )
        before = start.earlier.get("engine", engine)
        if before != engine:
            raise ValueError(
                f"--resume: the run was {before}, this one is {engine}, which sees different "
                "batches or cannot read its checkpoint; start it as before"
            )
        if trainer.injection_report is not None:
            self._say([f"\n{trainer.injection_report}\n"])
        first = self.recipe.values["training"].get("eval_on_start", True)
        args.eval_on_start = bool(first and self.prepared.eval and start.checkpoint is None)
        outline = Outline(trainer, self.prepared.size)
        for callback in (_FirstStep(self.folder, start), outline, self.health, self.stop):
            trainer.add_callback(callback)
        self.health.watch(trainer)
        shield_workers(trainer)
        guard_saves(
            trainer,
            start.run,
            saving=self.stop.saving,
            healthy=lambda: self.health.check(trainer.model, args, trainer.state.global_step),
        )
        if hasattr(trainer, "create_model_card"):  # TRL's overwrites README.md with every save
            trainer.create_model_card = lambda *_, **__: None
        self.samples = self._begin_samples()
        if self.folder is not None:
            self.folder.facts |= {
                "samples": self.samples,
                "base": base_location(self.recipe.model),
                "origin": origin(self.recipe),
                "machine": machine(),
                "command": self.command,
                "data": self.prepared.digest,
                "engine": engine,
                "processes": args.world_size,
            }

    def _begin_samples(self) -> list[dict[str, str]]:
        """Return completions before training, for the report, if one process can generate them."""
        if self.folder is None:
            return []
        if self.start.earlier.get("samples"):
            return self.start.earlier["samples"]
        trainer, count = self.trainer, self.recipe.data.samples
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        sharded |= getattr(trainer.model, "_tp_size", None) is not None
        nothing_to_show = self.prepared.eval is None or not count or self.recipe.kind.scores
        if nothing_to_show or sharded or self.start.checkpoint is not None:
            return []
        found = samples_of(self.prepared.eval, trainer.processing_class, count)
        return [{**asdict(sample), "before": self._complete(sample.ids)} for sample in found]

    def _complete(self, ids: list[int]) -> str:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return complete(model, self.trainer.processing_class, ids)

    def _train(self) -> None:
        trainer = self.trainer
        try:
            trainer.train(resume_from_checkpoint=self.start.checkpoint)
        except _NoStepsLeft:
            trainer.is_in_train = False
        except KeyboardInterrupt:  # in the evaluation after the last step, one process can go on
            state = trainer.state
            if self.args.world_size > 1 or not 0 < state.max_steps <= state.global_step:
                raise
        state = trainer.state
        healthy = self.health.check(trainer.model, self.args, state.global_step)
        if healthy and state.global_step < state.max_steps and not self.stop.stopped:
            raise RunError(
                f"training ended after {state.global_step} of {state.max_steps} steps, because the "
                "data gave no further batch. Add examples, or lower "
                "training.per_device_train_batch_size, gradient_accumulation_steps or "
                "generation_batch_size"
            )

    def _save(self) -> None:
        """Save the trained model in the folder of the first process, whoever saved checkpoints."""
        self.args.save_on_each_node = False
        self.stop.saving(True, model=True)
        try:
            with contextlib.ExitStack() as stack:
                staging = [None]
                if self.folder is not None:
                    self.folder.begin()
                    staging = [str(stack.enter_context(self.folder.staging()))]
                if self.args.world_size > 1:
                    broadcast_object_list(staging)
                save_whole_model(self.trainer.accelerator)
                self.trainer.save_model(staging[0])
                self.trainer.accelerator.wait_for_everyone()
                if self.folder is not None:
                    self.folder.publish(Path(staging[0]))
        except SAVE_ERRORS as error:
            raise RunError(
                f"the model could not be saved in {self.recipe.output_dir}: {reason(error)}. "
                + resume_hint(self.recipe.output_dir, self.start.run)
            ) from error
        finally:
            self.stop.saving(False)

    def _evaluate(self) -> None:
        """Evaluate the trained model, unless that was just done; a signal interrupts it."""
        saved = "The final evaluation was interrupted; the trained model is saved."
        try:
            self.stop.interrupt_evaluation(self.args)
            if self.prepared.eval is not None and not _evaluated_now(self.trainer.state):
                self.trainer.evaluate()
            for sample in self.samples:
                if self.stop.signaled:
                    raise EvaluationInterrupted
                sample["after"] = self._complete(sample["ids"])
        except EvaluationInterrupted:
            self._say([saved])
        except KeyboardInterrupt as interrupt:
            if self.args.world_size > 1:
                raise KeyboardInterrupt(saved) from interrupt
            self._say([saved])

    def _finish(self, interrupted: bool) -> RunResult:
        state, report = self.trainer.state, None
        peaks = gather_object([round(peak_memory_gib(), 3)])
        summary = summarize(state.log_history)
        summary |= {
            "steps": state.global_step,
            "trained_parameters": trained_parameters(self.trainer.model),
            "minutes": (time.perf_counter() - self.started) / 60,
            "engine": self.trainer.accelerator.distributed_type.value,
            "processes": self.args.world_size,
            "peak_memory_gib": max(summary["peak_memory_gib"], *peaks),
            "peak_memory_gib_by_process": peaks,
        }
        budget = budget_of(self.trainer.model)
        if budget is not None:
            summary["activation_memory"] = str(budget)
            self._say([f"activation memory {budget}"])
        warnings = [] if interrupted else self._warnings()
        if self.folder is not None:
            self.folder.begin()
            if interrupted:
                self.folder.write("interrupted", summary=summary)
            else:
                report = self.recipe.output_dir / "report.html"
                files = sorted({*self.folder.facts["files"], report.name})
                self.folder.write("finished", summary=summary, files=files, warnings=warnings)
                self._report(report, summary)
        return RunResult(
            self.recipe.output_dir,
            interrupted,
            summary,
            report,
            warnings,
            self.args.process_index == 0,
        )

    def _warnings(self) -> list[str]:
        steps = self.health.bad_losses
        if not steps:
            return []
        first = ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "")
        return [f"a loss was NaN or infinite, logged at step {first}; the weights are finite"]

    def _diverged(self) -> str:
        if self.folder is not None:
            self.folder.begin()
            self.folder.write("diverged")
        return (
            f"the weights became NaN or infinite by step {self.health.diverged}, and are not "
            "saved. Lower training.learning_rate, or look for examples that give no finite loss. "
            + resume_hint(self.recipe.output_dir, self.start.run)
        )

    def _report(self, path: Path, summary: dict[str, Any]) -> None:
        prepared, budget = self.prepared, summary.get("activation_memory")
        write_report(
            path,
            title=f"{self.recipe.path.stem}: {self.recipe.method} of {self.recipe.model.label}",
            summary=summary,
            log_history=self.trainer.state.log_history,
            injection=self.trainer.injection_report,
            recipe=self.recipe.shown,
            machine=machine()
            | {
                "Processes": engine_told(summary),
                "Peak memory by process": ", ".join(
                    f"{peak:.2f} GiB" for peak in summary["peak_memory_gib_by_process"]
                ),
            },
            samples=self.samples,
            command=self.command,
            notes=[
                f"Begun {self.folder.facts['started']}.",
                f"{prepared.size} training rows ({prepared.kind}), "
                f"{summary['trained_parameters']:,} trained parameters.",
                *prepared.notes,
                *([f"Activation memory: {budget}."] if budget else []),
            ],
        )

    def _say(self, lines) -> None:
        if self.args.process_index == 0:
            for line in lines:
                print(line, flush=True)


def _evaluated_now(state) -> bool:
    """Return whether the last evaluation was after the last step."""
    steps = [e["step"] for e in state.log_history if "eval_runtime" in e]
    return bool(steps) and steps[-1] == state.global_step
