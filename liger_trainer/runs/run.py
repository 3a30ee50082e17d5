"""Runs a recipe: data, model, trainer, and what is left behind: a model, `run.json`, a report."""

from __future__ import annotations

import inspect
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ProgressCallback

from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.collate import Collator
from liger_trainer.runs.data import Prepared, prepare
from liger_trainer.runs.html import write_report
from liger_trainer.runs.load import load_model, load_tokenizer
from liger_trainer.runs.recipe import Recipe
from liger_trainer.runs.throughput import Progress, StopOnSignal, Throughput, peak_memory_gib
from liger_trainer.trainer import LigerTrainer

_REPORTED_PACKAGES = (
    "liger-trainer",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `interrupted` tells that it stopped early, with a checkpoint."""

    output_dir: Path
    interrupted: bool
    summary: dict[str, Any]
    report: Path | None = None


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Trains as the recipe says.

    Raises ValueError for an output folder that holds another run, data without labels, packing on a
    model that cannot separate sequences; FileNotFoundError for missing files.
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


def build_trainer(recipe: Recipe, args) -> tuple[LigerTrainer, Prepared]:
    """The trainer of a recipe with its data, ready for `.train()`."""
    seed = args.seed if args.data_seed is None else args.data_seed
    tokenizer = load_tokenizer(recipe.model)
    with args.main_process_first(desc="data"):
        prepared = prepare(recipe.data, tokenizer, seed=seed)
    for note in prepared.notes:
        print(f"data: {note}")
    transformers.set_seed(args.seed)
    model = load_model(recipe.model)
    if recipe.data.packing:
        _require_separation(model, args)
    peft_config = recipe.peft_config()
    if peft_config is not None:
        import peft

        model = peft.get_peft_model(model, peft_config)
    flash = "flash" in (model.config._attn_implementation or "")
    trainer = LigerTrainer(
        model=model,
        args=args,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=Collator(tokenizer.pad_token_id, flatten=flash),
        processing_class=tokenizer,
        callbacks=[Throughput()],
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    return trainer, prepared


def summarize(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss before and after, mean tokens per second and peak memory, from the trainer's log."""
    held_out = [e["eval_loss"] for e in log_history if "eval_loss" in e]
    train = [e for e in log_history if "tokens_per_second" in e]
    losses = (
        {"train_loss_first": train[0]["loss"], "train_loss_last": train[-1]["loss"]}
        if train
        else {}
    )
    if held_out:
        losses |= {"eval_loss_before": held_out[0], "eval_loss_after": held_out[-1]}
    tokens, seconds, before = 0, 0.0, 0
    for entry in train:
        new = entry["num_input_tokens_seen"] - before
        before = entry["num_input_tokens_seen"]
        if new > 0 and entry["tokens_per_second"] > 0:
            tokens, seconds = tokens + new, seconds + new / entry["tokens_per_second"]
    return losses | {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_gib": max([peak_memory_gib(), *(e["peak_memory_gib"] for e in train)]),
    }


def machine() -> dict[str, str]:
    """Versions and hardware, for the report."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    facts = {"Device": device, "Python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _claim(recipe: Recipe, args, *, resume: bool, overwrite: bool) -> str | None:
    """Every process asks for the folder; the first one takes it, the others find it taken."""
    if args.process_index == 0:
        return run_folder.claim(recipe, resume=resume, overwrite=overwrite)
    return run_folder.get_last_checkpoint(str(recipe.output_dir)) if resume else None


def _require_separation(model, args) -> None:
    """Packed examples are told apart by their position ids, and only where no cache is kept."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"data.packing: {type(model).__name__} takes no position_ids, so packed examples would "
            "see each other. Set data.packing to false"
        )
    if args.use_cache:
        raise ValueError(
            "data.packing: with training.use_cache packed examples would see each other. "
            "Set one of the two to false"
        )


def _evaluated_now(state) -> bool:
    """Whether the last evaluation was of the model as it is."""
    steps = [e["step"] for e in state.log_history if "eval_loss" in e]
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
