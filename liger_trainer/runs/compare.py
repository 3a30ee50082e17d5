"""Differences between a recipe and that of an earlier run."""

from __future__ import annotations

import json
import os
from typing import Any

from liger_trainer.runs.recipe import SECTIONS, Recipe, defaults

# Values that change neither the model that comes out nor the order of what is drawn at random. The
# data's place is among them: its contents are compared, when they are there.
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
    """`section.key: before -> now` for every value that makes another run of `recipe`.

    Args:
        before: the shown values of the earlier recipe.
        resuming: whether a run may become longer or shorter.
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
    """Whether two values are equal, or are two names of one folder."""
    if a == b:
        return True
    if not (isinstance(a, str) and isinstance(b, str)):
        return False
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
