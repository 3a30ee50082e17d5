"""Data sets for the trainer: loaded, split, and text tokenized and packed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from liger_trainer.runs.data.alignment import prepare_examples
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.collate import PackedDataset
from liger_trainer.runs.data.rows import columns
from liger_trainer.runs.data.splits import load_splits
from liger_trainer.runs.data.text import tokenized
from liger_trainer.runs.data.tokenize import COLUMNS, detect_format


@dataclass(frozen=True)
class Prepared:
    """Datasets for the trainer, and what was left out on the way."""

    train: Any
    eval: Any | None
    kind: str  # the format that was found
    notes: tuple[str, ...]
    digest: str  # of the source's contents: the same for the same rows in the same order


def prepare(
    data: DataArguments, tokenizer, *, seed: int, examples: str = "text", needed: Iterable[str] = ()
) -> Prepared:
    """Loads and splits; text is tokenized and, if asked to, packed, other examples are checked.

    Args:
        examples: what the method trains on, `Method.examples`. All but "text" are tokenized by the
            method's trainer.
        needed: columns that have to be there besides the examples', for reward functions.

    Raises ValueError when no format is recognized, when no example has a label left, and, unless
    `data.invalid` is "drop", for examples that cannot be trained on.
    """
    train, held_out, digest = load_splits(data, seed)
    kind, notes = format_of(train, examples), []
    if held_out is not None and format_of(held_out, examples) != kind:
        raise ValueError(f"data: training examples are {kind}, held-out ones are not")
    options = {"seed": seed, "notes": notes, "kind": kind, "needed": needed}
    train = fit(train, data, tokenizer, what="training", **options)
    if held_out is not None:
        held_out = fit(held_out, data, tokenizer, what="held-out", **options)
    if data.packing:
        train = PackedDataset(train, data.max_length)
        held_out = held_out and PackedDataset(held_out, data.max_length)
    return Prepared(train, held_out, kind, tuple(notes), digest)


def format_of(dataset: Dataset, examples: str) -> str:
    """What the examples are: a key of `tokenize.COLUMNS` for text, else `examples` itself."""
    return detect_format(columns(dataset)) if examples == "text" else examples


def fit(
    dataset: Dataset,
    data: DataArguments,
    tokenizer,
    *,
    kind: str,
    what: str,
    seed: int,
    notes: list[str],
    needed: Iterable[str] = (),
) -> Dataset:
    """The rows that can be trained on: text as ids and labels, other kinds as their trainers take
    them. Raises ValueError as `prepare` does."""
    if kind in COLUMNS:
        return tokenized(data, tokenizer, kind, dataset, what, notes)
    return prepare_examples(
        dataset,
        tokenizer,
        kind=kind,
        what=what,
        notes=notes,
        max_length=data.max_length,
        invalid=data.invalid,
        needed=needed,
        seed=seed,
        num_proc=data.num_proc,
    )
