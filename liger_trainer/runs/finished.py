"""A finished run and its output, for the commands that follow training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.adapters import LOCATION, base_and_adapter, read_json, require_finished
from liger_trainer.runs.load import ModelArguments
from liger_trainer.runs.recipe.compare import weight_differences
from liger_trainer.runs.recipe.recipe import Recipe, recipe_of
from liger_trainer.runs.secrets import HIDDEN


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished run, the contents of its `run.json`, and its recipe."""

    path: Path
    record: dict[str, Any]
    recipe: Recipe

    @property
    def is_adapter(self) -> bool:
        return (self.path / "adapter_config.json").is_file()

    @property
    def is_lora(self) -> bool:
        return read_json(self.path / "adapter_config.json").get("peft_type") == "LORA"

    @property
    def tuned(self) -> ModelArguments:
        """The arguments of the trained model."""
        unset = dict.fromkeys(LOCATION)
        return dataclasses.replace(self.recipe.model, **{**unset, "name_or_path": str(self.path)})


def open_run(path: str | Path, overrides: Iterable[str] = ()) -> FinishedRun:
    """Return the finished run in a folder. Raises ValueError if there is none, if it is incomplete,
    and for overrides that the trained weights would not fit."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(path)!r}")
    record = run_folder.read(path)
    if record is None:
        raise ValueError(
            f"{path} holds no run: it has no {run_folder.RUN_FILE}. Give the folder that "
            "training.output_dir was"
        )
    require_finished(path, record["state"])
    values = {section: _known(keys) for section, keys in record["recipe"].items()}
    values["training"]["output_dir"] = str(path)
    run = FinishedRun(path, record, recipe_of(values, path / "run.yaml", overrides))
    changed = weight_differences(record["recipe"], run.recipe)
    if changed:
        raise ValueError(
            f"the weights in {path} are of another recipe ({'; '.join(changed)}): leave these "
            "values as they are"
        )
    base_and_adapter(run.tuned)  # raises if the model is no longer there
    return run


def _known(keys: Any) -> Any:
    """Return a section without the secrets, which were masked when it was written."""
    return {k: v for k, v in keys.items() if v != HIDDEN} if isinstance(keys, dict) else keys
