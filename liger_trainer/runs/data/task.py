"""What is to be made of the rows of a data set, and for which method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.forms import Form
from liger_trainer.runs.data.rows import Sieve


@dataclass(frozen=True)
class Purpose:
    """What a method requires of its examples."""

    examples: str = "text"  # `Method.examples`; all but "text" are tokenized by its trainer
    needed: Iterable[str] = ()  # further columns that must exist, for reward functions
    # raises RowError for a row that the method cannot use, such as one that can never be rewarded
    check: Callable[[dict], None] | None = None
    # loads the processor of text and images; None for a method that takes no images
    load_processor: Callable[[], Any] | None = None
    tools: bool = True  # its trainer passes a column `tools` to the chat template


@dataclass(frozen=True)
class Task:
    """To bring the rows of one data set, which have one form, to examples for one purpose."""

    purpose: Purpose
    form: Form
    data: DataArguments
    tokenizer: Any
    seed: int  # shuffles the two examples that a pair becomes
    sieve: Sieve
