"""Data sets for the trainer: loaded, split, brought to one form, tokenized, mixed and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from liger_trainer.runs.data.alignment import check_both_labels, prepare_examples
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.collate import PackedDataset
from liger_trainer.runs.data.forms import TEXT_FORMS, Form, form_of
from liger_trainer.runs.data.mixing import concatenated, mixed
from liger_trainer.runs.data.pair_stream import stream_pairs
from liger_trainer.runs.data.rows import Sieve
from liger_trainer.runs.data.splits import Part, load_splits
from liger_trainer.runs.data.text import stream, tokenized
from liger_trainer.runs.data.vision import (
    VisionCollator,
    has_images,
    length_check,
    prepare_images,
    with_images,
)

_TEXT_KINDS = {form.kind for form in TEXT_FORMS}


@dataclass(frozen=True)
class Purpose:
    """What a method makes of its examples."""

    examples: str = "text"  # `Method.examples`; all but "text" are tokenized by its trainer
    needed: Iterable[str] = ()  # columns that have to be there besides, for reward functions
    # raises RowError for a row that a reward function could never reward
    check: Callable[[dict], None] | None = None
    # the processor of text and images; None for a method that takes no images
    load_processor: Callable[[], Any] | None = None
    tools: bool = True  # whether its trainer gives a column `tools` to the chat template


TEXT = Purpose()


@dataclass(frozen=True)
class Prepared:
    """Datasets for the trainer, and what was left out on the way."""

    train: Any
    eval: Any | None
    kind: str  # the format that was found
    notes: tuple[str, ...]
    digest: str  # of the source's contents: the same for the same rows in the same order
    sieves: tuple[Sieve, ...] = ()  # what was found in each part, training and held-out
    processor: Any | None = None  # of text and images, where the examples have images

    @property
    def size(self) -> str:
        """How many rows there are to train on, for people."""
        return "streamed" if isinstance(self.train, IterableDataset) else str(len(self.train))


def prepare(data: DataArguments, tokenizer, purpose: Purpose = TEXT, *, seed: int) -> Prepared:
    """Load and split; text is tokenized and, if asked to, packed, other examples are checked.

    Raises ValueError when no format is recognized, when no example has a label left, and, unless
    `data.invalid` is "drop", for examples that cannot be trained on.
    """
    splits, notes, sieves, kinds = load_splits(data, seed), [], [], []
    parts = {"training": splits.train, "held-out": splits.held_out}
    processor = processor_for(splits.train + splits.held_out, data, purpose)
    fitted = {what: [] for what in parts}
    for what, part in ((what, part) for what, some in parts.items() for part in some):
        sieve = Sieve(what, part.source.label if len(splits.train) > 1 else "", data.invalid, notes)
        form = form_of(part.columns, purpose.examples, part.source.form)
        if form.convert and what == "training":
            notes.append(f"{part.source.label}: {form.name} rows, taken as {form.kind}")
        fitted[what].append(fit(part, data, tokenizer, form, sieve, purpose, processor, seed))
        sieves.append(sieve)
        kinds.append(form.kind)
    labels = {what: [part.source.label for part in some] for what, some in parts.items()}
    train = mixed(
        fitted["training"],
        [part.source.weight for part in splits.train],
        labels["training"],
        until=data.mix_until,
        seed=seed,
        notes=notes,
    )
    if purpose.examples == "labelled":
        check_both_labels(train)
    held_out = concatenated(fitted["held-out"], labels["held-out"]) if splits.held_out else None
    if data.packing:
        train = PackedDataset(train, data.max_length)
        held_out = held_out and PackedDataset(held_out, data.max_length)
    kind = ", ".join(dict.fromkeys(kinds))
    return Prepared(train, held_out, kind, tuple(notes), splits.digest, tuple(sieves), processor)


def _unused_tools(part: Part, form: Form) -> str:
    """Return a note on tools that only reward functions see; ValueError where nobody does."""
    if form.kind != "prompts":
        raise ValueError(
            f"data: {part.source.label} has a column `tools`, which the trainer of this method "
            "does not give to the chat template; remove the column, or use dpo or kto"
        )
    return f"{part.source.label}: `tools` go to reward functions, not to the chat template"


def processor_for(parts: list[Part], data: DataArguments, purpose: Purpose) -> Any | None:
    """Return the processor, if any of the data sets has images.

    Raises ValueError where the method, another key or the model has no use for them.
    """
    pictured = next((part for part in parts if has_images(part.columns)), None)
    if pictured is None:
        return None
    if purpose.load_processor is None:
        raise ValueError(
            f"data: {pictured.source.label} has images, which are for sft and dpo; remove the "
            "column, or use one of these methods"
        )
    for key in ("packing", "streaming"):
        if getattr(data, key):
            raise ValueError(f"data.{key}: not for examples with images; remove the key")
    return purpose.load_processor()


def fit(
    part: Part,
    data: DataArguments,
    tokenizer,
    form: Form,
    sieve: Sieve,
    purpose: Purpose,
    processor: Any | None,
    seed: int,
) -> Dataset | IterableDataset:
    """Return the rows that can be trained on: text as ids and labels, other kinds as their
    trainers take them. Raises ValueError as `prepare` does."""
    rows, check = part.rows, purpose.check
    if "tools" in part.columns and not purpose.tools:
        sieve.notes.append(_unused_tools(part, form))
    if processor is not None:
        rows = with_images(rows, part.source, sieve, data.num_proc)
        if form.kind in _TEXT_KINDS:
            return prepare_images(rows, data, processor, form, sieve)
        tokenizer = processor.tokenizer
        check = length_check(VisionCollator(processor, pairs=True), data.max_length)
    if form.kind in _TEXT_KINDS:
        if isinstance(rows, IterableDataset):
            return stream(rows, part.columns, data, tokenizer, form, sieve)
        return tokenized(rows, data, tokenizer, form, sieve)
    if isinstance(rows, IterableDataset):
        return stream_pairs(rows, part.source, part.columns, data, tokenizer, form, sieve)
    return prepare_examples(
        rows, data, tokenizer, form, sieve, needed=purpose.needed, check=check, seed=seed
    )
