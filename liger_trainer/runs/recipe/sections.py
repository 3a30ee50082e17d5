"""The sections of a recipe: the dataclass of each, its defaults, and the check of given values.

The keys of `training` are the fields of the *installed* `transformers.TrainingArguments` or of the
method's TRL configuration, and the keys of `peft` are those of `peft.LoraConfig`. A key that a
release has dropped is therefore an error.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from importlib.util import find_spec
from typing import Any

from liger_trainer.request import CONFIG, FLAG
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.files import expanded
from liger_trainer.runs.load import ModelArguments
from liger_trainer.runs.recipe.methods import (
    METHODS,
    arguments_class,
    refuse_unused,
    training_defaults,
)
from liger_trainer.runs.rewards.rewards import RewardArguments
from liger_trainer.runs.secrets import hidden
from liger_trainer.runs.typed import admits, convert, known

# Fields that may be paths; only in these are `~` and environment variables expanded.
_MODEL_PATHS = ("name_or_path", "tokenizer", "chat_template", "cache_dir", "offload_folder")
_PATHS = {
    "model": _MODEL_PATHS,
    "teacher": _MODEL_PATHS,
    "data": ("path", "eval_path", "mix"),
    "training": ("output_dir",),
}
# Options that a later release of transformers renamed: old name, new name.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

SECTIONS = ("model", "data", "training", "peft", "reward", "teacher")
_OPTIONAL = ("peft", "reward", "teacher")
# Classes of the sections that depend neither on the method nor on an optional package.
CLASSES = {
    "model": ModelArguments,
    "data": DataArguments,
    "reward": RewardArguments,
    "teacher": ModelArguments,
}
# Keys of `training` for this package, whether or not the configuration has such fields.
OWN_KEYS = {FLAG: bool, CONFIG: dict[str, bool | str | float] | None}


def _class_of(section: str, method: str) -> type:
    """Return the dataclass of a section. Raises ValueError if its package is not installed."""
    if section == "training":
        return arguments_class(method)
    if section == "peft":
        return lora_class()
    return CLASSES[section]


def lora_class() -> type:
    """Return `peft.LoraConfig`. Raises ValueError if PEFT is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("peft: the section needs `pip install peft`") from error
    return LoraConfig


def defaults(section: str, method: str) -> dict[str, Any]:
    """Return the default values of a section, except those that a factory creates."""
    found = {f.name: f.default for f in dataclasses.fields(_class_of(section, method))}
    usual = training_defaults(method) | METHODS[method].fixed if section == "training" else {}
    return {k: v for k, v in found.items() if v is not dataclasses.MISSING} | usual


def check_sections(values: dict[str, Any], method: str, sources: dict[str, str]) -> dict[str, Any]:
    """Return `values` with every section checked against its dataclass.

    Integers become floats where the field is one, and `~` and variables are expanded in paths.
    """
    elsewhere = functools.partial(_elsewhere, method)
    known("recipe", values, ["method", *SECTIONS], elsewhere)
    checked = {"method": method}
    for section in SECTIONS:
        given = values.get(section)
        if given is None and section in _OPTIONAL:
            continue
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise ValueError(f"{section}: expected keys and values, found {hidden(given)!r}")
        cls = _class_of(section, method)
        fields = [f.name for f in dataclasses.fields(cls) if f.init]
        hints = typing.get_type_hints(cls)
        if section == "training":
            given = _renamed(given, fields, sources)
            fields, hints = list(dict.fromkeys([*fields, *OWN_KEYS])), OWN_KEYS | hints
            hints["bf16"] |= typing.Literal["auto"]  # see `training_arguments`
        known(section, given, fields, elsewhere)
        checked[section] = {
            k: convert(f"{section}.{k}", v, hints[k])
            for k, v in given.items()
            if v is not None or (admits(hints[k], None) and k != "output_dir")  # else the default
        }
        for key in _PATHS.get(section, ()):
            if checked[section].get(key):
                checked[section][key] = expanded(f"{section}.{key}", checked[section][key])
    dropout = checked.get("peft", {}).get("lora_dropout", 0.0)
    if not 0 <= dropout < 1:  # PEFT reads a negative one as 0; with 1, nothing is trained
        raise ValueError(f"peft.lora_dropout is {dropout}; it must be at least 0 and below 1")
    refuse_unused(method, checked)
    return checked


def _elsewhere(method: str, key: str) -> str | None:
    """Return `section.key` of the first section that has the key, or None."""
    for section in SECTIONS:
        if section == "peft" and find_spec("peft") is None:
            continue
        if key in (f.name for f in dataclasses.fields(_class_of(section, method)) if f.init):
            return f"{section}.{key}"
    return None


def _renamed(given: dict[str, Any], fields: list[str], sources: dict[str, str]) -> dict[str, Any]:
    """Return `given` with renamed options under the name that the installed version has."""
    given = dict(given)
    for old, new in _RENAMED.items():
        if old in given and new in given:
            raise ValueError(f"training: {old} and {new} are the same option; keep one")
        wrong, right = (old, new) if new in fields else (new, old)
        if wrong in given:
            given[right] = given.pop(wrong)
            if f"training.{wrong}" in sources:
                sources[f"training.{right}"] = sources.pop(f"training.{wrong}")
    return given
