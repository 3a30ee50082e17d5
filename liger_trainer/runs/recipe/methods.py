"""The training methods: the trainer, configuration and kind of examples of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from liger_trainer import trl
from liger_trainer.trainer import LigerTrainer


@dataclass(frozen=True)
class Method:
    """One value of `method` in a recipe."""

    trainer: str | None = None  # `DPO` for DPOTrainer and DPOConfig of liger_trainer.trl
    examples: str = "text"  # "text", "pairs", "labeled" or "prompts": see data/alignment.py
    reference: bool = False  # the trainer takes a reference model
    counts_tokens: bool = True  # the trainer counts tokens itself
    teacher: bool = False  # the trainer takes a teacher model
    scores: bool = False  # the model returns one number per sequence instead of logits
    images: bool = False  # examples may have a column `images`
    tools: bool = True  # the trainer passes a column `tools` to the chat template
    # Fields of the configuration that define the method.
    fixed: dict[str, Any] = field(default_factory=dict)
    # Keys of the section `data` that the method does not use: the one value that describes what it
    # does anyway, and what to do instead of setting another.
    unused_data: dict[str, tuple[Any, str]] = field(default_factory=dict)


_PREFERENCE = {
    "packing": (
        False,
        "remove the key: examples are never packed, because each one has a loss of its own",
    ),
    "assistant_only": (True, "remove the key: completions alone are trained on"),
}
_WHOLE = _PREFERENCE | {
    "streaming": (
        False,
        "remove the key: TRL's trainer of this method tokenizes all pairs before it trains",
    )
}
_ONLINE = _PREFERENCE | {
    "max_length": (
        None,
        "remove the key: prompts are never cut, and training.max_completion_length limits what is "
        "generated",
    ),
    "num_proc": (None, "remove the key: prompts are tokenized while training"),
}

METHODS = {
    "sft": Method(images=True),
    "dpo": Method("DPO", "pairs", reference=True, images=True, unused_data=_PREFERENCE),
    "orpo": Method("ORPO", "pairs", counts_tokens=False, tools=False, unused_data=_WHOLE),
    "cpo": Method("CPO", "pairs", counts_tokens=False, tools=False, unused_data=_WHOLE),
    # SimPO (Meng et al. 2024, arXiv:2405.14734) is CPO with another margin and no likelihood term.
    "simpo": Method(
        "CPO",
        "pairs",
        counts_tokens=False,
        tools=False,
        fixed={"loss_type": "simpo", "cpo_alpha": 0.0},
        unused_data=_WHOLE,
    ),
    "kto": Method("KTO", "labeled", reference=True, unused_data=_PREFERENCE),
    "reward": Method("Reward", "pairs", scores=True, unused_data=_PREFERENCE),
    "grpo": Method("GRPO", "prompts", tools=False, unused_data=_ONLINE),
    "distillation": Method(
        "Distillation", "prompts", teacher=True, tools=False, unused_data=_ONLINE
    ),
    "rloo": Method("RLOO", "prompts", tools=False, unused_data=_ONLINE),
}

# Fields of TRL's configurations that a recipe must not set: another section owns them.
_ELSEWHERE = {
    "max_length": "set data.max_length instead",
    "dataset_num_proc": "set data.num_proc instead",
    "model_init_kwargs": "set the keys of the section model instead",
    "trust_remote_code": "set model.trust_remote_code instead",
    "teacher_model_name_or_path": "set the keys of the section teacher instead",
    "teacher_model_revision": "set teacher.revision instead",
    "teacher_model_init_kwargs": "set the keys of the section teacher instead",
    "include_num_input_tokens_seen": "remove the key: tokens are counted anyway",
}
_PUSH = "nothing is pushed while training; after it, use `liger-trainer push`"
# Fields that Trainer leaves to the calling program: values that would have no effect here.
_NO_EFFECT = {
    "resume_from_checkpoint": (bool, "use --resume, which finds the newest complete checkpoint"),
    "do_train": (lambda value: not value, "a recipe trains; use `liger-trainer evaluate`"),
    "do_eval": (lambda value: not value, "remove data.eval_fraction, eval_split and eval_path"),
    "enable_jit_checkpoint": (bool, "remove the key: SIGTERM saves a checkpoint anyway"),
    "do_predict": (bool, "there is no test set; use `liger-trainer evaluate`"),
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision"),
        (bool, _PUSH),
    ),
}
# Keys of `model` that TRL ignores when it loads the reference of GRPO and RLOO by name alone.
_REFERENCE_IGNORES = (
    "package", "gguf_file", "config", "quantization", "revision", "subfolder", "variant",
    "cache_dir", "token", "device_map",
)  # fmt: skip


def arguments_class(method: str) -> type:
    """Return the dataclass for the section `training`.

    Raises ValueError if the method needs TRL and it is not installed.
    """
    return TrainingArguments if METHODS[method].trainer is None else _of_trl(method, "Config")


def trainer_class(method: str) -> type:
    """Return the trainer of a method. Raises ValueError if it needs TRL, which is not installed."""
    return LigerTrainer if METHODS[method].trainer is None else _of_trl(method, "Trainer")


def _of_trl(method: str, suffix: str) -> type:
    try:
        return getattr(trl, f"{METHODS[method].trainer}{suffix}")
    except ImportError as error:
        raise ValueError(
            f"method: {method} needs TRL, which cannot be imported ({error}): `pip install trl`"
        ) from error


def training_defaults(method: str) -> dict[str, Any]:
    """Return a recipe's defaults that differ from those of the dataclass."""
    defaults = {"report_to": "none", "logging_steps": 10}
    if METHODS[method].trainer is None:
        return defaults | {"include_num_input_tokens_seen": "non_padding"}
    defaults["bf16"] = "auto"  # TRL's own default is bf16 wherever it runs, even emulated
    if METHODS[method].trainer in ("ORPO", "CPO"):
        defaults["remove_unused_columns"] = False  # otherwise these trainers set it, and warn
    return defaults


def derived_fields(method: str, model, data) -> dict[str, tuple[Any, str]]:
    """Return fields of the configuration that other keys determine: their value and its source."""
    chosen = METHODS[method]
    derived = {name: (value, f"method {method}") for name, value in chosen.fixed.items()}
    if chosen.trainer is None:
        return derived
    if "max_length" not in chosen.unused_data:
        derived["max_length"] = (data.max_length, "data.max_length")
        if data.num_proc is not None:
            derived["dataset_num_proc"] = (data.num_proc, "data.num_proc")
    if model.trust_remote_code:
        derived["trust_remote_code"] = (True, "model.trust_remote_code")
    return derived


def check_options(args) -> None:
    """Raise the error that Trainer would raise later, for options that it interprets only then."""
    try:
        args.get_process_log_level()
    except KeyError as error:
        raise ValueError(f"log_level: {error} is no level") from error
    get_reporting_integration_callbacks(args.report_to)
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)]),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def refuse_unused(method: str, values: dict[str, Any]) -> None:
    """Raise ValueError for keys that the method would ignore, and for missing ones it needs."""
    chosen = METHODS[method]
    for key, (anyway, advice) in chosen.unused_data.items():
        if values["data"].get(key, anyway) != anyway:
            raise ValueError(f"data.{key}: not for {method}; {advice}")
    for key, (has_no_effect, advice) in _NO_EFFECT.items():
        if key in values["training"] and has_no_effect(values["training"][key]):
            raise ValueError(f"training.{key}: remove the key; {advice}")
    for key in values["training"] if chosen.trainer else ():
        if key in _ELSEWHERE:
            raise ValueError(f"training.{key}: {_ELSEWHERE[key]}")
    for key, value in chosen.fixed.items():
        if values["training"].get(key, value) != value:
            raise ValueError(
                f"training.{key}: {method} means {value!r}; remove the key, or use method: cpo"
            )
    if chosen.teacher != (values.get("teacher") is not None):
        raise ValueError(
            f"teacher: {method} needs a teacher; set its model with the keys of the section model"
            if chosen.teacher
            else f"teacher: not for {method}; remove the section, or use method: distillation"
        )
    if chosen.examples == "prompts" and not chosen.teacher:
        _check_reward(method, values)
    elif values.get("reward") is not None:
        raise ValueError(f"reward: not for {method}; remove the section, or use method: grpo")


def _check_reward(method: str, values: dict[str, Any]) -> None:
    functions = (values.get("reward") or {}).get("functions")
    if not functions:
        raise ValueError(
            f"reward: {method} needs rewards; name one or more functions, for example "
            "`reward: {functions: [parses, passes_tests]}`"
        )
    weights = values["training"].get("reward_weights")
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"training.reward_weights: {len(weights)} weights for {len(functions)} functions in "
            "reward.functions; give each its own"
        )
    default = arguments_class(method).__dataclass_fields__["beta"].default
    beta, given = values["training"].get("beta", default), values["model"]
    ignored = [f"model.{key}" for key in _REFERENCE_IGNORES if given.get(key) is not None]
    if beta and ignored and values.get("peft") is None:
        raise ValueError(
            f"training.beta is {beta}, so a reference model is needed. TRL loads it by "
            f"model.name_or_path alone, without {', '.join(ignored)}. Set training.beta to 0, add "
            "a peft section (the reference is then the model without adapter), or save the model "
            "to a folder first"
        )
