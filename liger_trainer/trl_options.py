"""Options of TRL's configs that the chosen loss would not use: an error, never a silence."""

from __future__ import annotations

from transformers import TrainingArguments


def check_options(trainer: type, args: TrainingArguments) -> None:
    """Raises ValueError for an option that the trainer's loss does not use."""
