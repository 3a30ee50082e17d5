"""Data sets for the trainer: loaded, split, brought to one form, tokenized, mixed and packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset

from liger_trainer.runs.data.alignment import check_both_labels, prepare_examples
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.collate import PackedDataset
from liger_trainer.runs.data.example_stream import stream_examples
from liger_trainer.runs.data.forms import TEXT_FORMS, Form, form_of
from liger_trainer.runs.data.mixing import concatenated, mixed
from liger_trainer.runs.data.rows import Sieve
from liger_trainer.runs.data.splits import Part, load_splits
from liger_trainer.runs.data.task import Purpose, Task
from liger_trainer.runs.data.text import tokenized, tokenized_stream
from liger_trainer.runs.data.vision import (
    VisionCollator,
    has_images,
    length_check,
    prepare_images,
    with_images,
)

_TEXT = Purpose()
_TEXT_KINDS = {form.kind for form in TEXT_FORMS}


@dataclass(frozen=True)
class Prepared:
    """Datasets for the trainer, and notes about rows that were left out."""

    train: Any
    eval: Any | None
    kind: str  # the kind of examples that was recognized
    notes: tuple[str, ...]
    digest: str  # of the source's contents: equal for equal rows in the same order
    sieves: tuple[Sieve, ...] = ()  # one for each part, training and held-out
    processor: Any | None = None  # of text and images, if the examples have images

    @property
    def size(self) -> str:
        """The number of training rows, or "streamed", for messages."""
        return "streamed" if isinstance(self.train, IterableDataset) else str(len(self.train))


def prepare(data: DataArguments, tokenizer, purpose: Purpose = _TEXT, *, seed: int) -> Prepared:
    """Load and split the data; tokenize (and pack) text, check other examples.

    Raises ValueError if no format is recognized, if no example has a label left, and, unless
    `data.invalid` is "drop", for examples that cannot be trained on.
    """
    splits, notes, sieves, kinds = load_splits(data, seed), [], [], []
    parts = {"training": splits.train, "held-out": splits.held_out}
    processor = processor_for(splits.train + splits.held_out, data, purpose)
    fitted = {split: [] for split in parts}
    for split, part in ((split, part) for split, some in parts.items() for part in some):
        name = part.source.label if len(splits.train) > 1 else ""
        sieve = Sieve(split, name, data.invalid, notes)
        form = form_of(part.columns, purpose.examples, part.source.form)
        if form.convert and split == "training":
            notes.append(f"{part.source.label}: {form.name} rows, taken as {form.kind}")
        task = Task(purpose, form, data, tokenizer, seed, sieve)
        fitted[split].append(fit(part, task, processor))
        sieves.append(sieve)
        kinds.append(form.kind)
    labels = {split: [part.source.label for part in some] for split, some in parts.items()}
    train = mixed(
        fitted["training"],
        [part.source.weight for part in splits.train],
        labels["training"],
        until=data.mix_until,
        seed=seed,
        notes=notes,
    )
    if purpose.examples == "labeled" and not data.streaming:
        check_both_labels(train)
    held_out = concatenated(fitted["held-out"], labels["held-out"]) if splits.held_out else None
    if data.packing:
        train = PackedDataset(train, data.max_length)
        held_out = held_out and PackedDataset(held_out, data.max_length)
    kind = ", ".join(dict.fromkeys(kinds))
    return Prepared(train, held_out, kind, tuple(notes), splits.digest, tuple(sieves), processor)


def processor_for(parts: list[Part], data: DataArguments, purpose: Purpose) -> Any | None:
    """Return the processor if any of the data sets has images, else None.

    Raises ValueError if the method, another key or the model does not support images.
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


def fit(part: Part, task: Task, processor: Any | None) -> Dataset | IterableDataset:
    """Return the rows that can be trained on: text as ids and labels, others as trainers take them.

    Raises ValueError as `prepare` does.
    """
    rows, sieve = part.rows, task.sieve
    is_text, is_stream = task.form.kind in _TEXT_KINDS, isinstance(rows, IterableDataset)
    if "tools" in part.columns and not task.purpose.tools:
        sieve.notes.append(_unused_tools(part, task.form))
    if processor is not None:
        rows = with_images(rows, part.source, sieve, task.data.num_proc)
        if is_text:
            return prepare_images(rows, processor, task)
        check = length_check(VisionCollator(processor, pairs=True), task.data.max_length)
        purpose = replace(task.purpose, check=check)
        task = replace(task, tokenizer=processor.tokenizer, purpose=purpose)
    if is_text:
        return tokenized_stream(rows, part.columns, task) if is_stream else tokenized(rows, task)
    return stream_examples(part, task) if is_stream else prepare_examples(rows, task)


def _unused_tools(part: Part, form: Form) -> str:
    """Return a note that only reward functions get `tools`; raise ValueError if nothing does."""
    if form.kind != "prompts":
        raise ValueError(
            f"data: {part.source.label} has a column `tools`, which the trainer of this method "
            "does not give to the chat template; remove the column, or use dpo or kto"
        )
    return f"{part.source.label}: `tools` go to reward functions, not to the chat template"
