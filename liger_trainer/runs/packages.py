"""Optional packages: which ones a recipe needs, which of these are missing, and how to get them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

# By what a recipe says: the distributions of which one is enough, the first being the usual one.
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
    "flash_attention_2": ("flash-attn", "kernels"),  # transformers falls back on the latter
    "flash_attention_3": ("flash-attn-3", "kernels"),
    "flash_attention_4": ("flash-attn-4", "kernels"),
}
_OPTIMIZERS = {  # by the beginning of `training.optim`
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
    """Whether one of these is installed. A folder that happens to have the name does not count."""
    for name in distributions:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


def missing(values: dict[str, Any]) -> list[str]:
    """Return a sentence, with the command, for everything that a recipe's values need and that is
    not installed. `peft` and `trl` are not among them: without those a recipe cannot be read."""
    return [
        f"{what} needs the package {names[0]}, which is not installed: `pip install {names[0]}`"
        for what, names in _needed(values)
        if not installed(*names)
    ]


def _needed(values: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    model, training = values["model"], values["training"]
    reporters = training.get("report_to") or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name in _REPORTERS:
            yield f"training.report_to: {name}", _REPORTERS[name]
    if model.get("gguf_file"):
        yield "model.gguf_file", ("gguf",)
    if model.get("quantization"):
        yield "model.quantization", ("bitsandbytes",)
    attention = model.get("attn_implementation")
    if attention in _ATTENTION:
        yield f"model.attn_implementation: {attention}", _ATTENTION[attention]
    optimizer = str(training.get("optim") or "")
    for beginning, names in _OPTIMIZERS.items():
        if optimizer.startswith(beginning):
            yield f"training.optim: {optimizer}", names
    if training.get("deepspeed"):
        yield "training.deepspeed", ("deepspeed",)
    if training.get("use_vllm"):
        yield "training.use_vllm", ("vllm",)
