"""Find what would make a run fail, before anything is loaded or written."""

from __future__ import annotations

import math
import os

import torch

from liger_trainer.runs.adapters import base_and_adapter
from liger_trainer.runs.build import check_generations, load_rewards, packing_problems, purpose_of
from liger_trainer.runs.data.arguments import is_file_name
from liger_trainer.runs.data.forms import form_of
from liger_trainer.runs.data.prepare import fit, processor_for
from liger_trainer.runs.data.rows import Sieve
from liger_trainer.runs.data.sources import first_rows
from liger_trainer.runs.data.splits import part_of
from liger_trainer.runs.data.task import Task
from liger_trainer.runs.load import ModelArguments, load_config, load_tokenizer, meta_model
from liger_trainer.runs.packages import Need, missing, needed_by_model
from liger_trainer.runs.recipe.recipe import Recipe

_ROWS = 100  # rows per data set that a dry run checks
_AT_LEAST = {
    "dataloader_num_workers": 0,
    "eval_accumulation_steps": 1,
    "generation_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "beta": 0,
    "label_smoothing_factor": 0,
    "learning_rate": 0,
    "max_completion_length": 1,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "num_generations": 2,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "save_total_limit": 1,
    "seed": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
_ABOVE_ZERO = ("eval_steps", "logging_steps", "num_train_epochs", "save_steps", "temperature")


def require(recipe: Recipe) -> None:
    """Raise ValueError with all `problems`."""
    found = problems(recipe)
    if found:
        raise ValueError("; ".join(found))


def require_for_model(arguments: ModelArguments) -> None:
    """Raise ValueError with every package without which the model cannot be loaded."""
    base, adapter = base_and_adapter(arguments)
    needs = list(needed_by_model(vars(base)))
    if adapter is not None:
        needs.append(Need(f"the adapter in {adapter}", ("peft",)))
    found = [str(need) for need in needs if not need.is_met]
    if found:
        raise ValueError("; ".join(found))


def problems(recipe: Recipe) -> list[str]:
    """Return sentences about what is wrong with the recipe itself: missing packages, wrong
    numbers."""
    fields, found = recipe.values["training"], missing(recipe.values)
    for key, least in _AT_LEAST.items():
        if fields.get(key) is not None and fields[key] < least:
            found.append(f"training.{key} is {fields[key]}; it must be at least {least}")
    for key, value in fields.items():
        if value in (math.inf, -math.inf) and key != "max_grad_norm":  # which then clips nothing
            found.append(f"training.{key} is {value}; it must be finite")
    for key in _ABOVE_ZERO:
        if fields.get(key) is not None and fields[key] <= 0:
            found.append(f"training.{key} is {fields[key]}; it must be above 0")
    if fields.get("max_steps", -1) != -1 and fields["max_steps"] < 1:
        found.append(
            f"training.max_steps is {fields['max_steps']}; it must be at least 1, or -1 for what "
            "training.num_train_epochs comes to"
        )
    if recipe.data.streaming and fields.get("max_steps", -1) < 1:
        found.append(
            "data.streaming: a stream has no known length, so set training.max_steps to the number "
            "of steps"
        )
    if recipe.data.streaming and fields.get("precompute_ref_log_probs"):
        found.append(
            "training.precompute_ref_log_probs: not for data.streaming, which reads no example "
            "before training; remove the key"
        )
    try:
        _, adapter = base_and_adapter(recipe.model)
    except ValueError as error:
        return [*found, str(error)]
    if adapter is not None and recipe.values.get("peft") is not None:
        found.append(
            f"peft: the model in {adapter} is an adapter already; remove the section to train it "
            "further, or make one model of it first: `liger-trainer merge`"
        )
    return found


def conflicts(recipe: Recipe) -> list[str]:
    """Return warnings: sentences about what may surprise or fail later, but does not stop a run."""
    fields, found = recipe.values["training"], []
    on_gpu = torch.cuda.is_available() and not fields.get("use_cpu")
    if fields.get("bf16") and fields.get("fp16"):
        found.append("training.bf16 and training.fp16 are both set; keep one")
    if fields.get("fp16") and not on_gpu:
        found.append("training.fp16 has no effect without a GPU, and there is none here")
    if fields.get("bf16") is True and fields.get("use_cpu"):
        found.append(
            "training.bf16 may be slow on a CPU; `bf16: auto` uses it only where it is native"
        )
    checkpointing = fields.get("gradient_checkpointing") or fields.get("activation_checkpointing")
    if checkpointing and (fields.get("use_cache") or (recipe.model.config or {}).get("use_cache")):
        found.append("gradient checkpointing cannot keep a cache; remove use_cache")
    if fields.get("max_steps", -1) > 0 and "num_train_epochs" in fields:
        found.append(
            "training.max_steps and training.num_train_epochs are both set; max_steps wins"
        )
    if fields.get("save_only_model"):
        found.append("training.save_only_model leaves the optimizer out: such a run cannot resume")
    if fields.get("liger_kernel_config") is not None and not fields.get("use_liger_kernel"):
        found.append("training.liger_kernel_config has no effect while use_liger_kernel is off")
    for key in ("eval_strategy", "load_best_model_at_end"):
        if not recipe.data.holds_out and fields.get(key) not in (None, False, "no"):
            found.append(
                f"training.{key} needs held-out examples: set data.eval_fraction, "
                "data.eval_split or data.eval_path"
            )
    if fields.get("load_best_model_at_end") and fields.get("eval_strategy", "no") in ("no", False):
        found.append(
            "training.load_best_model_at_end has no effect without training.eval_strategy and "
            "training.save_strategy"
        )
    try:
        load_rewards(recipe)
    except ValueError as error:
        found.append(str(error))
    return found


def model_problems(recipe: Recipe) -> list[str]:
    """Return problems that the model's configuration shows, without loading weights.

    The configuration may have to be fetched from a hub.
    """
    config, found = load_config(recipe.model).get_text_config(), []
    longest = getattr(config, "max_position_embeddings", None)
    used = "max_length" not in recipe.kind.unused_data
    if used and longest is not None and recipe.data.max_length > longest:
        found.append(
            f"data.max_length is {recipe.data.max_length}, the model has only {longest} positions"
        )
    model = meta_model(recipe.model, scores=recipe.kind.scores)
    if recipe.data.packing:
        use_cache = bool(recipe.values["training"].get("use_cache"))
        found += packing_problems(model, use_cache=use_cache)
    try:
        recipe.adapted(model)
    except ValueError as error:
        found.append(str(error))
    return found


def check_training(recipe: Recipe) -> None:
    """Raise ValueError if the installed version rejects `training`, or its batches do not fit."""
    args = recipe.training_arguments()
    if recipe.data.holds_out:
        check_generations(args)


def check_data(recipe: Recipe) -> None:
    """Raise ValueError for problems in the first rows of local data; a hub's is not fetched."""
    data = recipe.data
    sources = [(source, "training") for source in data.sources]
    sources += [(source, "held-out") for source in data.eval_sources]
    if not all(_is_local(path) for source, _ in sources for path in source.paths):
        return
    purpose = purpose_of(recipe, load_rewards(recipe))
    tokenizer = load_tokenizer(recipe.model)
    loaded = [
        (part_of(source, first_rows(source, _ROWS, streaming=data.streaming)), split)
        for source, split in sources
    ]
    processor = processor_for([part for part, _ in loaded], data, purpose)
    for part, split in loaded:
        form = form_of(part.columns, purpose.examples, part.source.form)
        sieve = Sieve(f"first {split}", invalid=data.invalid)
        fit(part, Task(purpose, form, data, tokenizer, recipe.data_seed, sieve), processor)


def _is_local(path: str) -> bool:
    """Return whether a path is local, even if nothing exists there."""
    return os.path.exists(path) or path.startswith(("/", ".")) or is_file_name(path)
