"""Whether a recipe fits on N GPUs, from the model's configuration alone."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from liger_trainer.config import KernelConfig
from liger_trainer.runs.adapters import base_and_adapter
from liger_trainer.runs.load import load_config
from liger_trainer.runs.planning.counts import shape_of, weights_of
from liger_trainer.runs.planning.memory import Run, peak, usable
from liger_trainer.runs.planning.shapes import CONFIGS, config_of
from liger_trainer.runs.recipe.recipe import Recipe
from liger_trainer.runs.recipe.sections import defaults

_METHODS = {"sft": 1, "dpo": 2, "orpo": 2, "cpo": 2, "simpo": 2}  # sequences per example
# Bytes of optimizer states per trained element; None: two values of the weight's own dtype.
_OPTIMIZERS = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_8bit": 2 + 8 / 256,  # two bytes, and two fp32 scales for each block of 256
    "adamw_bnb_8bit": 2 + 8 / 256,
    "sgd": 0,
}
_MAX_GPUS = 4096
# Changes of a `Run`, and how a user makes them.
_CHECKPOINTED = {"checkpointing": True}
_REDUCED = {"reduce_each": True}
_SETTINGS = {
    "engine": "--engine {}",
    "checkpointing": "training.gradient_checkpointing=true",
    "reduce_each": (
        "training.accelerator_config='{{gradient_accumulation_kwargs: {{sync_each_batch: true}}}}'"
    ),
    "batch": "training.per_device_train_batch_size={}",
}


def fits(run: Run) -> bool:
    """Return whether a GPU has the memory that a run needs."""
    return peak(run).total <= usable(run.memory)


def run_of(recipe: Recipe, *, gpus: int, memory: float, engine: str, shape: str | None) -> Run:
    """Return the inputs of the formulas for a recipe on `gpus` GPUs of `memory` GiB.

    Only the model's configuration is loaded; with `shape`, a name for `config_of`, not even that.
    Raises ValueError for a recipe that the formulas do not cover, and for a configuration that
    cannot be loaded.
    """
    fields = defaults("training", recipe.method)
    fields |= {key: value for key, (value, _) in recipe.training_fields().items()}
    kernels = _covered(recipe, fields)
    model = _meta_model(recipe, shape)
    sizes, whole = shape_of(model), weights_of(model)
    weights = weights_of(recipe.adapted(model))
    # `auto` depends on the machine; every current GPU supports bf16.
    mixed = bool(fields.get("bf16") or fields.get("fp16"))
    narrow = mixed or engine.startswith("zero") or weights.head_dtype_bytes == 2
    reference = recipe.kind.reference and recipe.values.get("peft") is None
    run = Run(
        sizes,
        weights,
        tokens=fields["per_device_train_batch_size"]
        * recipe.data.max_length
        * _METHODS[recipe.method],
        length=recipe.data.max_length,
        batch=fields["per_device_train_batch_size"],
        accumulation=fields["gradient_accumulation_steps"],
        compute=2 if narrow else 4,
        mixed=mixed,
        lean=kernels.activation_memory != "keep",
        checkpointing=_checkpointing(fields) and not kernels.has_budget,
        reduce_each=_reduce_each(fields),
        optimizer=_OPTIMIZERS[_name(fields["optim"])],
        reference_bytes=whole.trained_bytes if reference else 0,
        engine=engine,
        gpus=gpus,
        memory=memory,
    )
    if kernels.has_budget:
        run = replace(run, checkpointing=run.sharded or not fits(run))
    return run


def ways_out(run: Run) -> list[str]:
    """Return changes that would make a run fit: each that suffices alone, else a combination.

    Empty if no known change does.
    """
    found = [f"{more} GPUs" for more in [_fewest_gpus(run)] if more is not None]
    batches = _batches(run)
    enough = [change for change in (_CHECKPOINTED, _REDUCED) if fits(replace(run, **change))]
    enough += [change for change in batches if fits(replace(run, **change))][:1]
    found += [", ".join(_settings(run, change)) for change in enough if _settings(run, change)]
    if found:
        return found
    sharded = {} if run.sharded else {"engine": "fsdp2"}
    both = sharded | _CHECKPOINTED | _REDUCED
    for change in (sharded, sharded | _CHECKPOINTED, both, *(both | batch for batch in batches)):
        more = _fewest_gpus(replace(run, **change))
        if more is not None:
            return [", ".join([*_settings(run, change), f"{more} GPUs"])]
    return []


def _batches(run: Run) -> list[dict]:
    """Return changes to fewer examples per micro-batch, the largest number first."""
    each = run.tokens // run.batch
    return [{"batch": b, "tokens": b * each} for b in range(run.batch - 1, 0, -1)]


def _settings(run: Run, change: dict) -> list[str]:
    """Return a change as options or recipe keys, without those that the run has already."""
    return [
        _SETTINGS[key].format(value)
        for key, value in change.items()
        if key in _SETTINGS and getattr(run, key) != value
    ]


def _fewest_gpus(run: Run) -> int | None:
    """Return the smallest number of GPUs, above the run's, on which it fits; None if none does."""
    low, high = run.gpus, _MAX_GPUS
    if low >= high or not fits(replace(run, gpus=high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = fits(replace(run, gpus=middle))
        low, high = (low, middle) if enough else (middle, high)
    return high


def _covered(recipe: Recipe, fields: dict) -> KernelConfig:
    """Return the kernels of a recipe. Raises ValueError if the formulas do not cover the recipe."""
    if recipe.method not in _METHODS:
        raise ValueError(f"plan: not for method {recipe.method}; it is for {', '.join(_METHODS)}")
    if not fields.get("use_liger_kernel"):
        raise ValueError("plan: the formulas assume training.use_liger_kernel=true")
    kernels = KernelConfig.from_dict(fields.get("liger_kernel_config"))
    switched_off = [
        f.name for f in dataclasses.fields(kernels) if getattr(kernels, f.name) is False
    ]
    if switched_off:
        raise ValueError(
            f"plan: the formulas assume that all kernels are on; off: {', '.join(switched_off)}"
        )
    if base_and_adapter(recipe.model)[1] is not None:
        raise ValueError("plan: the model is an adapter; name its base, and give a peft section")
    if recipe.model.quantization:
        raise ValueError("plan: model.quantization is not covered")
    for key in ("fsdp", "deepspeed", "parallelism_config"):
        if fields.get(key):
            raise ValueError(f"plan: training.{key} is not read; remove it and use --engine")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if fields[key] < 1:
            raise ValueError(f"training.{key} is {fields[key]}; it must be at least 1")
    if _name(fields["optim"]) not in _OPTIMIZERS:
        raise ValueError(
            f"plan: training.optim: {_name(fields['optim'])} is not covered; "
            f"covered are {', '.join(_OPTIMIZERS)}"
        )
    return kernels


def _meta_model(recipe: Recipe, shape: str | None):
    """Return the model on the meta device, in the dtype in which the recipe loads it."""
    if shape is None:
        try:
            config = load_config(recipe.model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"plan: no configuration of {recipe.model.label}: {reason.rstrip('.')}. "
                f"Without it, --shape is one of {', '.join(CONFIGS)}"
            ) from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"plan: {type(config).__name__} is not a transformers language model")
    else:
        settings = config_of(shape)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    named = recipe.model.dtype
    if named in (None, "auto"):
        dtype = getattr(config, "dtype", None) or torch.float32
    else:
        dtype = getattr(torch, named)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _checkpointing(fields: dict) -> bool:
    """Return whether every layer is checkpointed; the newer name wins, as in transformers."""
    newer = fields.get("activation_checkpointing")
    return bool(fields.get("gradient_checkpointing") if newer is None else newer)


def _reduce_each(fields: dict) -> bool:
    config = fields.get("accelerator_config")
    kwargs = config.get("gradient_accumulation_kwargs") if isinstance(config, dict) else None
    return bool((kwargs or {}).get("sync_each_batch"))


def _name(optimizer) -> str:
    return str(getattr(optimizer, "value", optimizer))
