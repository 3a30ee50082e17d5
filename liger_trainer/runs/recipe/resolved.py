"""A recipe with every value that is set, for people to read."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from liger_trainer.runs.recipe.recipe import Recipe
from liger_trainer.runs.secrets import hidden


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML: every value that is set, with a comment on where it comes from."""
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


def _set_fields(section: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(section).items() if v is not None}
