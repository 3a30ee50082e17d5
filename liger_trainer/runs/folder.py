"""The output folder of a run: who may write there, what was run, where to resume.

`run.json` holds the recipe as given and the state of the run. A folder that holds a run, or a model
that no run of this package wrote, is never written to by accident.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from liger_trainer.runs.recipe import Recipe

RUN_FILE = "run.json"
_MODEL_FILES = ("config.json", "adapter_config.json")


def refusal(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> str | None:
    """Why a run of `recipe` must not start in its output folder, and what to do; None if it may."""
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        return f"training.output_dir: {folder} is a file"
    earlier = read(folder)
    if resume:
        return _resume_refusal(recipe, earlier)
    if earlier is None:
        found = [n for n in _MODEL_FILES if (folder / n).exists()]
        found += [p.name for p in folder.glob("checkpoint-*")]
        if found:
            return (
                f"training.output_dir: {folder} holds {found[0]}, which no run of this program "
                "wrote. Choose another training.output_dir"
            )
        return None
    if overwrite:
        return None
    changed = differences(earlier["recipe"], recipe.values)
    other = "another recipe (" + "; ".join(changed) + ")" if changed else "this recipe"
    resumable = not changed and earlier["state"] != "finished"
    return (
        f"training.output_dir: {folder} holds a run of {other}, state: {earlier['state']}. "
        + ("Continue it with --resume, replace" if resumable else "Replace")
        + " it with --overwrite, or choose another training.output_dir"
    )


def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> str | None:
    """Takes the folder for this run; returns the checkpoint to resume from, if there is one.

    Raises ValueError when `refusal` has a reason.
    """
    reason = refusal(recipe, resume=resume, overwrite=overwrite)
    if reason:
        raise ValueError(reason)
    folder = recipe.output_dir
    if overwrite and read(folder) is not None:
        _remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(recipe, "running")
    return get_last_checkpoint(str(folder)) if resume else None


def read(folder: Path) -> dict[str, Any] | None:
    """The contents of `run.json`, or None where there is none."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove the file") from error


def write(recipe: Recipe, state: str, **facts: Any) -> None:
    """Records the state of the run: running, interrupted or finished."""
    path = recipe.output_dir / RUN_FILE
    content = json.dumps({"state": state, "recipe": recipe.values, **facts}, indent=2)
    partial = path.with_suffix(".partial")
    partial.write_text(content + "\n")
    partial.replace(path)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key: before -> now` for every value that differs."""
    flat_before, flat_now = _flat(before), _flat(now)
    keys = sorted(k for k in {*flat_before, *flat_now} if flat_before.get(k) != flat_now.get(k))
    return [f"{k}: {flat_before.get(k)} -> {flat_now.get(k)}" for k in keys]


def _resume_refusal(recipe: Recipe, earlier: dict[str, Any] | None) -> str | None:
    folder = recipe.output_dir
    if earlier is None:
        return f"--resume: there is no run in {folder}; leave the option away to start one"
    changed = differences(earlier["recipe"], recipe.values)
    if changed:
        return (
            f"--resume: the run in {folder} had another recipe ({'; '.join(changed)}). "
            "Use the same values, or choose another training.output_dir"
        )
    if earlier["state"] == "finished":
        return f"--resume: the run in {folder} is finished; replace it with --overwrite"
    return None


def _remove_run(folder: Path) -> None:
    """Removes what a run writes and nothing else."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for pattern in (RUN_FILE, "report.html", "*.safetensors", "*.safetensors.index.json"):
        for path in folder.glob(pattern):
            path.unlink()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = value
    return out
