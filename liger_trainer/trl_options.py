"""Options of TRL's configs that the chosen loss would not use: an error, never a silence."""

from __future__ import annotations

import dataclasses

from transformers import TrainingArguments

from liger_trainer.kernels.kto import KTOLoss
from liger_trainer.kernels.policy import GRPOLoss, RLOOLoss
from liger_trainer.kernels.preference import DPOLoss
from liger_trainer.kernels.reference_free import CPOLoss, ORPOLoss

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
    """Raises ValueError for an option of `args` that the trainer's loss does not use.

    The losses' own formulas decide (`kernels/preference.py` and its neighbours): they take no
    option in vain.
    """
    base = next((cls for cls in trainer.__mro__ if cls.__module__.startswith("trl.")), None)
    loss = _LOSSES.get(getattr(base, "__qualname__", None))
    if loss is None:
        return
    given = {}
    for field in dataclasses.fields(loss):
        name = _RENAMED.get(field.name, field.name)
        if hasattr(args, name):
            given[field.name] = getattr(args, name)
    if given.get("loss_type") != "dr_grpo":  # the length limits generation in any case
        given.pop("max_completion_length", None)
    try:
        loss(**given)
    except ValueError as error:
        raise ValueError(f"{type(args).__name__}: {error}") from error
