"""Encode text examples as token ids and labels, and report those that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset, Features, IterableDataset, Sequence, Value

from liger_trainer.runs.data.rows import (
    ROW,
    RowError,
    Sieve,
    check_text,
    encoded_stream,
    note_unshown,
    without_flawed,
)
from liger_trainer.runs.data.task import Task
from liger_trainer.runs.data.tokenize import IGNORE_INDEX, encoder

_IDS = Sequence(Value("int64"))
_TOKENS = Features({"input_ids": _IDS, "labels": _IDS})
_ENCODED = Features(
    {
        **_TOKENS,
        "flaw": Value("string"),
        "length": Value("int64"),
        "unshown": Value("string"),
    }
)


def tokenized(rows: Dataset, task: Task) -> Dataset:
    """Return `input_ids` and `labels` of the rows that can be trained on.

    Raises ValueError as `without_flawed` does, and if messages meet no chat template.
    """
    encoded = rows.map(
        row_encoder(task),
        remove_columns=[name for name in rows.column_names if name != ROW],
        features=Features({**_ENCODED, ROW: rows.features[ROW]}),
        num_proc=task.data.num_proc,
        desc=f"Tokenizing {task.sieve.split} examples",
    )
    encoded = without_flawed(encoded, encoded["flaw"][:], task.sieve)
    _note(encoded, task.data.max_length, task.sieve)
    return encoded.select_columns(list(_TOKENS))


def tokenized_stream(rows: IterableDataset, columns: list[str], task: Task) -> IterableDataset:
    """Return a stream of `input_ids` and `labels`, encoded from `columns` while training.

    A row that cannot be trained on raises ValueError when it is read, or is dropped.
    """
    found = encoded_stream(rows, columns, row_encoder(task), task.sieve, features=_ENCODED)
    return found.select_columns(list(_TOKENS))


def row_encoder(task: Task) -> Callable[[dict], dict]:
    """Return a function from a row to the columns of `_ENCODED`; `flaw` states why a row cannot be
    trained on."""
    form, data = task.form, task.data
    encode = encoder(
        task.tokenizer,
        kind=form.kind,
        max_length=data.max_length,
        assistant_only=data.assistant_only,
    )
    no_label = (
        f"there is nothing to train on within data.max_length ({data.max_length} tokens): raise "
        "it, shorten the prompts, or set data.assistant_only to false"
    )

    def encoded(row: dict) -> dict:
        try:
            example = form.apply(row)
            check_form(form.kind, example)
            found = encode(example)
            if all(label == IGNORE_INDEX for label in found["labels"]):
                raise RowError(no_label)
        except RowError as error:
            nothing = {"input_ids": [], "labels": [], "length": 0, "unshown": ""}
            return {**nothing, "flaw": str(error)}
        return {**found, "unshown": ", ".join(found["unshown"]), "flaw": ""}

    return encoded


def _note(encoded: Dataset, max_length: int, sieve: Sieve) -> None:
    """Add notes about parts of the rows that the model will not see."""
    sieve.cut = sum(length > max_length for length in encoded["length"])
    if sieve.cut:
        sieve.notes.append(
            f"cut {sieve.cut} of {len(encoded)} {sieve.examples} at data.max_length "
            f"({max_length} tokens)"
        )
    note_unshown(encoded["unshown"], sieve)


def check_form(kind: str, example: dict) -> None:
    """Raise RowError for a row whose columns do not hold what `kind` requires."""
    if kind == "tokenized":
        if not example["input_ids"]:
            raise RowError("`input_ids` is empty")
    elif kind == "text":
        text = example["text"]
        if not (text is None or isinstance(text, str)):
            raise RowError(f"`text` is {text!r}, which is not text")
        check_text("text", text)
    elif kind == "messages":
        messages = example["messages"]
        if isinstance(messages, str):
            raise RowError("`messages` is text; name its column `text`, or give a list of messages")
        check_text("messages", messages)
    else:
        check_text("prompt", example["prompt"], may_be_empty=True)
        check_text("completion", example["completion"])
