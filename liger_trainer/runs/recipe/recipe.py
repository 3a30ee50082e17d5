"""A recipe: YAML plus command-line overrides, checked key by key before anything is loaded.

Precedence: command line, then YAML, then defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from liger_trainer.config import KernelConfig
from liger_trainer.request import CONFIG, FLAG
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.files import read_text, suggest_path
from liger_trainer.runs.load import ModelArguments
from liger_trainer.runs.recipe.methods import (
    METHODS,
    Method,
    arguments_class,
    check_options,
    derived_fields,
    training_defaults,
)
from liger_trainer.runs.recipe.parse import parse
from liger_trainer.runs.recipe.sections import (
    CLASSES,
    OWN_KEYS,
    SECTIONS,
    check_sections,
    defaults,
    lora_class,
)
from liger_trainer.runs.rewards.rewards import RewardArguments
from liger_trainer.runs.secrets import hidden, hidden_override
from liger_trainer.runs.shipped import recipe_names, shipped


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a run, and where each value came from."""

    path: Path
    method: str
    model: ModelArguments
    data: DataArguments
    values: dict[str, Any]  # nested, as given: YAML and command line
    sources: dict[str, str]  # "training.learning_rate" -> "recipe", or "command line"
    reward: RewardArguments | None = None
    teacher: ModelArguments | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.values["training"]["output_dir"])

    @property
    def kind(self) -> Method:
        """The description of the method."""
        return METHODS[self.method]

    @property
    def shown(self) -> dict[str, Any]:
        """The `values` with tokens and passwords masked, to print and write."""
        return hidden(self.values)

    @property
    def data_seed(self) -> int:
        """The seed that shuffles and splits the data."""
        fields = defaults("training", self.method) | self.values["training"]
        return fields["seed"] if fields["data_seed"] is None else fields["data_seed"]

    def training_fields(self) -> dict[str, tuple[Any, str]]:
        """Return every field of `training` that is set: its value, and where it comes from."""
        fields = {k: (v, "default") for k, v in training_defaults(self.method).items()}
        for key, value in self.values["training"].items():
            fields[key] = (value, self.sources.get(f"training.{key}", "default"))
        return fields | derived_fields(self.method, self.model, self.data)

    def training_arguments(self):
        """Return the configuration of the method. `bf16: auto` depends on the machine.

        Raises ValueError with the section's name if the installed version rejects a value.
        """
        cls = arguments_class(self.method)
        given = self.training_fields().items()
        fields = {k: v for k, (v, _) in given if k not in OWN_KEYS or hasattr(cls, k)}
        fields.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            fields.setdefault("use_cpu", True)  # else each process would train on its own
        fits = fields.get("use_cpu") or torch.accelerator.is_available()
        if fields.get("bf16") is True and not fits:
            raise ValueError(
                "training.bf16 is true, and there is no GPU here; `bf16: auto` uses it only where "
                "it is native"
            )
        if fields.get("bf16") == "auto":
            fields["bf16"] = native_bf16() and not fields.get("fp16")
        try:
            args = cls(**fields)
            check_options(args)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"training: {error}") from error
        return args

    @property
    def kernels(self) -> bool | dict:
        """The trainer's `liger_kernel_config`: the switches, True for all, False for no kernels."""
        given = self.values["training"]
        return bool(given.get(FLAG)) and (given.get(CONFIG) or True)

    def peft_config(self):
        """Return the `LoraConfig`, or None without a `peft` section.

        Raises ValueError if PEFT rejects it.
        """
        if self.values.get("peft") is None:
            return None
        try:
            return lora_class()(**{"task_type": "CAUSAL_LM", **self.values["peft"]})
        except (ValueError, TypeError) as error:
            raise ValueError(f"peft: {error}") from error

    def adapter_for(self, model):
        """Return `peft_config()`. Raises ValueError if the model lacks a module that is to be
        saved, which PEFT would ignore."""
        config = self.peft_config()
        names = [name for name, _ in model.named_modules()]
        for wanted in getattr(config, "modules_to_save", None) or ():
            if not any(name.endswith(wanted) for name in names):
                raise ValueError(f"peft.modules_to_save: the model has no module {wanted!r}")
        return config

    def adapted(self, model):
        """Return a model with the adapter of the section `peft`, if there is one.

        Raises ValueError if the section does not fit the model.
        """
        config = self.adapter_for(model)
        if config is None:
            return model
        import peft

        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"peft: {error}") from error


def native_bf16() -> bool:
    """Return whether there is an accelerator that computes bf16 at full speed."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the checked recipe in a file, or of a packaged one by name (`sft/qwen3-8b-lora`).

    Nothing is downloaded or created. Raises FileNotFoundError for a missing recipe, and ValueError
    for bad YAML, an unknown section or key (suggesting the nearest name), and a value of the wrong
    type.
    """
    path = _find(path)
    return recipe_of(_read(path), path, overrides)


def recipe_of(values: dict[str, Any], path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the checked recipe of nested values. Raises ValueError as `load_recipe` does."""
    values = copy.deepcopy(values)  # overrides must not change the caller's
    given = {section: keys for section, keys in values.items() if isinstance(keys, dict)}
    sources = {f"{section}.{key}": "recipe" for section, keys in given.items() for key in keys}
    for override in overrides:
        _apply(override, values, sources)
    method = values.setdefault("method", "sft")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    values = check_sections(values, method, sources)
    stem = path.stem if method == "sft" else f"{method}-{path.stem}"
    values["training"].setdefault("output_dir", f"runs/{stem}")
    KernelConfig.from_dict(values["training"].get("liger_kernel_config") or {})
    filled = {name: cls(**values[name]) for name, cls in CLASSES.items() if name in values}
    return Recipe(path, method, values=values, sources=sources, **filled)


def _find(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"the recipe {str(path)!r} is a folder; give a YAML file")
    if str(name) in recipe_names():
        return shipped(f"{name}.yaml")
    close = difflib.get_close_matches(str(name), recipe_names(), n=3, cutoff=0.6)
    hint = f"; of the shipped ones, there is {', '.join(close)}" if close else ""
    raise FileNotFoundError(f"no recipe {str(path)!r}{suggest_path(path)}{hint}")


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        values = parse(text) or {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of the sections {', '.join(SECTIONS)}")
    return values


def _apply(override: str, values: dict[str, Any], sources: dict[str, str]) -> None:
    """Apply one `section.key=value` to `values`; the value is a YAML scalar or flow."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{override!r} is not of the form section.key=value")
    override = hidden_override(override)
    try:
        value = parse(text)
    except ValueError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from error
    *parents, leaf = key.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ValueError(f"{override!r}: {parent!r} is a value, not a section with keys")
    before = target.get(leaf)
    replaced = hidden(before, leaf)
    source = "command line" if before is None else f"command line; the recipe has {replaced}"
    target[leaf] = value
    # A section may be given as a whole.
    whole = isinstance(value, dict) and not parents
    for name in [f"{key}.{name}" for name in value] if whole else [key]:
        sources[".".join(name.split(".")[:2])] = source
