"""Differences between a recipe and that of an earlier run."""

from __future__ import annotations

import json
import os
from typing import Any

from liger_trainer.runs.recipe.recipe import Recipe
from liger_trainer.runs.recipe.sections import SECTIONS, defaults

# Keys that affect neither the trained model nor the order of random draws. The location of the data
# is among them, because its contents are compared once they are loaded.
_HARMLESS = {
    "data": {"path", "eval_path", "num_proc", "samples"},
    "model": {"token", "cache_dir", "local_files_only", "offload_folder"},
    "training": {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "disable_tqdm",
        "include_tokens_per_second",
        "log_level",
        "log_level_replica",
        "logging_dir",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "output_dir",
        "project",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "skip_memory_metrics",
        "trackio_space_id",
    },
}
_LENGTH = {"max_steps", "num_train_epochs"}


def differences(before: dict[str, Any], recipe: Recipe, *, resuming: bool = False) -> list[str]:
    """Return `section.key: before -> now` for every value that would make `recipe` a different run.

    Args:
        before: the values of the earlier recipe, as `run.json` holds them.
        resuming: allow the run to become longer or shorter.
    """
    now, found = json.loads(json.dumps(recipe.shown)), []  # as the earlier one was written
    if before.get("method") != now["method"]:
        return [f"method: {before.get('method')} -> {now['method']}"]
    for section in SECTIONS:
        old, new = before.get(section), now.get(section)
        if (old is None) != (new is None):
            found.append(f"{section}: " + ("none -> some" if old is None else "some -> none"))
            continue
        usual = defaults(section, recipe.method)
        skipped = _HARMLESS.get(section, set()) | (_LENGTH if resuming else set())
        for key in sorted({*(old or ()), *(new or ())} - skipped):
            values = [usual.get(key) if s.get(key) is None else s[key] for s in (old, new)]
            if not _same(*values):
                found.append(f"{section}.{key}: {values[0]} -> {values[1]}")
    return found


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, or are paths of the same file or folder."""
    if a == b:
        return True
    if not (isinstance(a, str) and isinstance(b, str)):
        return False
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
