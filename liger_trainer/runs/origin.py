"""What a run was made from, by the names that a hub knows: for the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from liger_trainer.runs.adapters import base_and_adapter, read_json
from liger_trainer.runs.data.sources import files_of
from liger_trainer.runs.load import ModelArguments
from liger_trainer.runs.recipe.recipe import Recipe


def origin(recipe: Recipe) -> dict[str, Any]:
    """Return `base_model`, None if no hub has it, and `datasets`, those from a hub.

    Call it while the recipe runs: a name that is a folder now may look like a hub's elsewhere.
    """
    named = [
        source.path
        for source in (*recipe.data.sources, *recipe.data.eval_sources)
        if source.loader is None and not files_of(source) and _is_on_a_hub(source.path)
    ]
    return {"base_model": _base(recipe.model), "datasets": list(dict.fromkeys(named))}


def _base(arguments: ModelArguments) -> str | None:
    base, _ = base_and_adapter(arguments)
    if base.package is not None or base.name_or_path is None:
        return None
    if _is_on_a_hub(base.name_or_path):
        return base.name_or_path
    earlier = read_json(Path(base.name_or_path) / "run.json").get("origin") or {}
    return earlier.get("base_model")  # a run that began from another run


def _is_on_a_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()
