"""Differences between a recipe and that of an earlier run, for two questions.

`differences`: would the recipe make another run? Then an earlier one cannot continue by it.
`weight_differences`: would it train another model? Then an earlier one's weights do not fit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from liger_trainer.runs.adapters import LOCATION
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
    """Return `section.key: before -> now` for every value that would make `recipe` another run.

    Args:
        before: the values of the earlier recipe, as `run.json` holds them.
        resuming: allow the run to become longer or shorter.
    """

    def counts(section: str, key: str) -> bool:
        may_change = resuming and section == "training" and key in _LENGTH
        return not may_change and key not in _HARMLESS.get(section, ())

    return _compared(before, recipe, counts)


def weight_differences(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """Return the same for the values that tell which model was trained: method, base, adapter.

    All others may change: that model can be loaded in another dtype, and evaluated on other data.
    """

    def counts(section: str, key: str) -> bool:
        return section == "peft" or (section == "model" and key in LOCATION)

    return _compared(before, recipe, counts)


def _compared(
    before: dict[str, Any], recipe: Recipe, counts: Callable[[str, str], bool]
) -> list[str]:
    """Return the differences in the keys for which `counts(section, key)` is true.

    A key that is missing has its default, so it equals one that is set to it.
    """
    now, found = json.loads(json.dumps(recipe.shown)), []  # as the earlier one was written
    if before.get("method") != now["method"]:
        return [f"method: {before.get('method')} -> {now['method']}"]
    for section in SECTIONS:
        old, new = before.get(section), now.get(section)
        if (old is None) != (new is None):
            if counts(section, ""):
                found.append(f"{section}: " + ("none -> some" if old is None else "some -> none"))
            continue
        usual = defaults(section, recipe.method)
        for key in sorted({*(old or ()), *(new or ())}):
            values = [usual.get(key) if s.get(key) is None else s[key] for s in (old, new)]
            if counts(section, key) and not _same(*values):
                found.append(f"{section}.{key}: {values[0]} -> {values[1]}")
    return found


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, or are paths of the same file or folder."""
    if a == b:
        return True
    if not (isinstance(a, str) and isinstance(b, str)):
        return False
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
