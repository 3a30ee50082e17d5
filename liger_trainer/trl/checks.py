"""Raise errors, before training starts, for problems that TRL's trainers silently accept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from liger_trainer.kernels.losses.dpo import DPOLoss
from liger_trainer.kernels.losses.grpo import GRPOLoss, RLOOLoss
from liger_trainer.kernels.losses.kto import KTOLoss
from liger_trainer.kernels.losses.reference_free import CPOLoss, ORPOLoss
from liger_trainer.trl.fused_head import has_adapter
from liger_trainer.trl.replacements import defers

_LOSSES = {
    "CPOTrainer": CPOLoss,
    "DPOTrainer": DPOLoss,
    "GRPOTrainer": GRPOLoss,
    "KTOTrainer": KTOLoss,
    "ORPOTrainer": ORPOLoss,
    "RLOOTrainer": RLOOLoss,
}
_RENAMED = {"epsilon_low": "epsilon"}


def check_options(trainer: type, args: TrainingArguments) -> None:
    """Raise ValueError for an option of `args` that the trainer's loss does not use.

    The losses in `kernels/losses/` check this: they reject options that have no effect.
    """
    loss = _LOSSES.get(_trl_names(trainer)[0])
    if loss is None:
        return
    given = {}
    for field in dataclasses.fields(loss):
        name = _RENAMED.get(field.name, field.name)
        if hasattr(args, name):
            given[field.name] = getattr(args, name)
    if given.get("loss_type") != "dr_grpo":  # the option also limits generation
        given.pop("max_completion_length", None)
    try:
        loss(**given)
    except ValueError as error:
        raise ValueError(f"{type(args).__name__}: {error}") from error


def _trl_names(trainer: type) -> list[str]:
    """Return the names of the TRL classes that `trainer` is derived from, the nearest first.

    Its own name stands alone if there are none.
    """
    names = [cls.__qualname__ for cls in trainer.__mro__ if cls.__module__.startswith("trl.")]
    return names or [trainer.__qualname__]


def check_examples(trainer: Trainer) -> None:
    """Raise ValueError for prepared examples without completion tokens.

    The log-probability of an empty completion is 0, the maximum: as chosen it wins, as rejected it
    cannot lose, and averaged over its length it is NaN.
    """
    evaluation = trainer.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"evaluation": evaluation}
    for name, dataset in {"training": trainer.train_dataset, **named}.items():
        if not isinstance(dataset, Dataset):
            continue
        empty = sorted(set(_without_completion(dataset)))
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} {name} examples have a completion without tokens "
                f"(the first is row {empty[0]}): it is empty, or max_length cuts it off. Remove "
                "them, or raise max_length."
            )


def _without_completion(dataset: Dataset) -> Iterator[int]:
    for column in ("chosen_ids", "rejected_ids", "completion_ids"):
        if column in dataset.column_names:
            yield from (i for i, length in enumerate(_lengths(dataset, column)) if not length)
    for column in ("chosen_labels", "rejected_labels"):
        if column in dataset.column_names:
            rows = enumerate(dataset[column])
            yield from (i for i, labels in rows if all(label == -100 for label in labels))


def _lengths(dataset: Dataset, column: str) -> Iterator[int]:
    """Yield the lengths of the lists in a column, without converting elements to Python objects."""
    tables = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    for table in tables:
        yield from pc.list_value_length(table[column]).to_pylist()


_SAMPLING = {"GRPOTrainer", "RLOOTrainer", "DistillationTrainer"}


def ranks_of_a_row(accelerator: Accelerator) -> int:
    """Return how many processes share the tokens of every row."""
    parallel = getattr(accelerator, "parallelism_config", None)
    return getattr(parallel, "cp_size", 1) * getattr(parallel, "sp_size", 1)


def check_ranks(trainer: Trainer) -> None:
    """Raise ValueError for a trainer that cannot share rows, or a model, with other processes.

    Only SFT's loss is a sum over tokens, independent of which process has them. TRL seeds every
    process differently, so that completions differ; ranks that share a model by tensor parallelism
    would add up tensors of different completions.
    """
    name, *bases = _trl_names(type(trainer))
    if name != "SFTTrainer" and ranks_of_a_row(trainer.accelerator) > 1:
        raise ValueError(
            f"{name} needs whole rows, and with context or sequence parallelism (cp_size, sp_size) "
            "a process has a part of each: use FSDP2 or ZeRO-3, or train with SFT."
        )
    sampling = next((n for n in (name, *bases) if n in _SAMPLING), None)
    if sampling and (getattr(trainer.model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{sampling} samples different completions in every process, but the processes "
            "that share a model by tensor parallelism need the same ones: use FSDP2 or ZeRO-3, or "
            "train on a fixed data set (SFT, DPO)."
        )


def check_reference(model: nn.Module, reference: nn.Module) -> None:
    """Raise ValueError if the reference's vocabulary has another size than the policy's."""
    sizes = [_vocabulary(m) for m in (model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the policy scores {sizes[0]} tokens, the reference {sizes[1]}: their "
            "log-probabilities cannot be compared. Use a reference with the policy's tokenizer; "
            "model.resize_token_embeddings(n) makes padded sizes equal."
        )


def _vocabulary(model: nn.Module) -> int | None:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None


_WITHOUT_ADAPTER = (
    "remove the head from target_modules (and, if it is tied to the embeddings, their tokens from "
    "trainable_token_indices)"
)


def check_adapter(model: nn.Module) -> None:
    """Raise ValueError if TRL's own head, which reads the plain weight, would ignore an adapter."""
    if has_adapter(model):
        raise ValueError(
            "An adapter on the head needs fused_linear_cross_entropy, which is switched off here: "
            f"switch it on, or {_WITHOUT_ADAPTER}."
        )


def check_heads(trainer: Trainer) -> None:
    """Raise ValueError if distillation would ignore, or fail at, an adapter on a head.

    Unless the logits of both models are deferred, TRL's loss takes the plain weights of both heads.
    """
    if "DistillationTrainer" not in _trl_names(type(trainer)):
        return
    named = {"student": trainer.model, "teacher": trainer.teacher_model}
    models = {
        name: trainer.accelerator.unwrap_model(model)
        for name, model in named.items()
        if model is not None
    }
    if len(models) < 2 or all(defers(trainer, model) for model in models.values()):
        return
    ways_out = {
        "student": f"{_WITHOUT_ADAPTER}, or train with GKDTrainer",
        "teacher": "merge it first (teacher_model.merge_and_unload())",
    }
    for name, model in models.items():
        if has_adapter(model):
            raise ValueError(
                f"DistillationTrainer reads the plain weight of the {name}'s output head, not the "
                f"adapter on it: {ways_out[name]}."
            )
