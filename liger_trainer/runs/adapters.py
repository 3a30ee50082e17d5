"""A folder that holds an adapter, or a run, as the model of another run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

# Fields of the section `model` that identify the weights; the others determine how to load them.
LOCATION = ("name_or_path", "package", "gguf_file", "revision", "subfolder", "variant", "config")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("config.json", "adapter_config.json")


def base_and_adapter(arguments: Any) -> tuple[Any, Path | None]:
    """Return the arguments of the base model, and the folder of the adapter if they name one.

    The base is stated by the `run.json` next to the adapter, or else by `adapter_config.json`.
    Raises ValueError for a run that is not finished or whose model is gone, and for an adapter
    without a base or on another adapter.
    """
    folder = Path(arguments.name_or_path or "")
    if arguments.package is not None or not arguments.name_or_path or not folder.is_dir():
        return arguments, None
    run = read_json(folder / "run.json")
    if "state" in run:
        require_finished(folder, run["state"])
    if not any((folder / name).is_file() for name in MODEL_FILES) and run:
        raise ValueError(
            f"model.name_or_path: the model of the run in {folder} is gone: there is neither "
            f"{' nor '.join(MODEL_FILES)}"
        )
    if not (folder / "adapter_config.json").is_file():
        return arguments, None
    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ValueError(
            f"model.name_or_path: {folder} has an adapter_config.json, but no "
            f"{_ADAPTER_WEIGHTS[0]}: put the adapter's weights there, or train it again"
        )
    base = run.get("base")
    if base is None:
        name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not name:
            raise ValueError(
                f"model.name_or_path: {folder}/adapter_config.json names no base: "
                "write the hub name or the folder of its base into base_model_name_or_path"
            )
        base = {"name_or_path": name}
    chosen = {key: base.get(key) for key in LOCATION}
    if arguments.config:
        chosen["config"] = {**(chosen["config"] or {}), **arguments.config}
    innermost, inner = base_and_adapter(dataclasses.replace(arguments, **chosen))
    if inner is not None:
        raise ValueError(
            f"model.name_or_path: the base of the adapter in {folder} is itself an adapter, "
            f"{inner}: merge that one first (`liger-trainer merge`), and write the folder of the "
            f"merged model into base_model_name_or_path of {folder}/adapter_config.json"
        )
    return innermost, folder


def require_finished(folder: Path, state: str) -> None:
    """Raise ValueError unless a run is finished.

    Until then, a model in its folder is that of the run that it extends, or partly saved.
    """
    if state != "finished":
        raise ValueError(
            f"the run in {folder} is {state}, not finished: finish it with `liger-trainer train`, "
            "its recipe and --resume"
        )


def base_location(arguments: Any) -> dict[str, Any]:
    """Return the location of the base model of `arguments`, which `run.json` stores as `base`."""
    base, _ = base_and_adapter(arguments)
    return {key: getattr(base, key) for key in LOCATION if getattr(base, key) is not None}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
