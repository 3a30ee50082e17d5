"""What a recipe would do, without doing it: `--dry-run` and `inspect`."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
from typing import Any

import torch
import yaml

from liger_trainer.injection.walk import inject
from liger_trainer.report import InjectionReport
from liger_trainer.runs.load import ModelArguments, load_config, meta_model
from liger_trainer.runs.recipe import Recipe
from liger_trainer.runs.secrets import hidden


def injection_plan(
    model: ModelArguments, kernels: dict[str, bool] | None = None, *, strict: bool = False
) -> InjectionReport:
    """Return what `inject` would swap, from the configuration alone: no weights, no memory."""
    return inject(meta_model(model), kernels, strict=strict)


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML with every value that is set and, beside it, where that came
    from."""
    sections: dict[str, Any] = {
        "method": recipe.method,
        "model": _set_fields(recipe.model),
        "data": {
            key: value
            for key, value in _set_fields(recipe.data).items()
            if key not in recipe.kind.unused_data
        },
        "training": {key: value for key, (value, _) in recipe.training_fields().items()},
    }
    for section in ("peft", "reward", "teacher"):
        if recipe.values.get(section) is not None:
            sections[section] = recipe.values[section]
    origins = {f"training.{key}": where for key, (_, where) in recipe.training_fields().items()}
    sections = hidden(sections)
    lines = [f"method: {sections.pop('method')}"]
    for section, fields in sections.items():
        lines.append(f"{section}:")
        for key, value in fields.items():
            name = f"{section}.{key}"
            source = origins.get(name) or recipe.sources.get(name, "default")
            first, *more = yaml.safe_dump({key: value}, sort_keys=False).rstrip("\n").split("\n")
            lines += [f"  {first}  # {source}", *(f"  {line}" for line in more)]
    lines.append("# every field that is not listed has the default of the installed release")
    return "\n".join(lines)


def conflicts(recipe: Recipe) -> list[str]:
    """Return what would fail or surprise, one sentence each, as far as the recipe alone shows
    it."""
    return [*_training_conflicts(recipe), *_data_conflicts(recipe), *_reward_conflicts(recipe)]


def model_conflicts(recipe: Recipe) -> list[str]:
    """Conflicts with the model's configuration, which may have to be fetched from a hub."""
    config, found = load_config(recipe.model).get_text_config(), []
    longest = getattr(config, "max_position_embeddings", None)
    used = "max_length" not in recipe.kind.unused_data
    if used and longest is not None and recipe.data.max_length > longest:
        found.append(
            f"data.max_length is {recipe.data.max_length}, the model has only {longest} positions"
        )
    if recipe.data.packing:
        forward = python_inspect.signature(meta_model(recipe.model).forward)
        if "position_ids" not in forward.parameters:
            found.append("data.packing: the model takes no position_ids, so examples would mix")
        if recipe.values["training"].get("use_cache"):
            found.append("data.packing: with training.use_cache examples would mix")
    return found


def _training_conflicts(recipe: Recipe) -> list[str]:
    fields, found = recipe.values["training"], []
    on_gpu = torch.cuda.is_available() and not fields.get("use_cpu")
    if fields.get("bf16") and fields.get("fp16"):
        found.append("training.bf16 and training.fp16 are both set; keep one")
    if fields.get("fp16") and not on_gpu:
        found.append("training.fp16 needs a GPU, and there is none here")
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
    if "liger_kernel_config" in fields and not fields.get("use_liger_kernel"):
        found.append("training.liger_kernel_config has no effect while use_liger_kernel is off")
    return found


def _data_conflicts(recipe: Recipe) -> list[str]:
    data, fields, found = recipe.data, recipe.values["training"], []
    held_out = data.eval_path or data.eval_split or data.eval_fraction
    if not held_out:
        for key in ("eval_strategy", "load_best_model_at_end"):
            if fields.get(key) not in (None, False, "no"):
                found.append(
                    f"training.{key} needs held-out examples: set data.eval_fraction, "
                    "data.eval_split or data.eval_path"
                )
    return found


def _reward_conflicts(recipe: Recipe) -> list[str]:
    try:
        if recipe.reward is not None:
            recipe.reward.load()
    except ValueError as error:
        return [str(error)]
    return []


def _set_fields(section: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(section).items() if v is not None}
