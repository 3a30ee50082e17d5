"""Files that come with the package: recipes, accelerate configurations, data. A leaf.

The folder `recipes` is inside the package in a wheel, and next to it in a checkout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MEMORY = re.compile(r"take ([\d.]+ GB)")


def folder() -> Path:
    """Return the folder `recipes`. Raises FileNotFoundError if the installation lacks it."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "recipes", package.parent / "recipes"]
    found = next((path for path in places if path.is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"this installation has no recipes; looked in {places[0]}")
    return found


def shipped(name: str) -> Path:
    """Return the path of a file in `recipes/`."""
    return folder() / name


def recipe_names() -> list[str]:
    """Return the names of all recipes, such as `sft/qwen3-8b-lora`."""
    paths = folder().glob("*/*.yaml")
    return sorted(f"{p.parent.name}/{p.stem}" for p in paths if p.parent.name != "accelerate")


def accelerate_names() -> list[str]:
    """Return the names of all configurations of accelerate, such as `fsdp2`."""
    return sorted(path.stem for path in folder().glob("accelerate/*.yaml"))


@dataclass(frozen=True)
class Header:
    """The contents of the comment at the top of a recipe."""

    about: str  # its first sentence
    memory: str  # of weights, gradients and optimizer states; empty if not stated


def header(path: Path) -> Header:
    """Return the contents of the comment at the top of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    memory = _MEMORY.search(text)
    return Header(text.partition(". ")[0].rstrip("."), memory[1] if memory else "")
