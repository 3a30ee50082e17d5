"""Find rows of a dataset that cannot be used, and name them by number and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

ROW = "__row__"  # column with a row's number in its source, counted from 1

# Raises RowError for a row that cannot be used; returns fields that the template hides.
RowCheck = Callable[[dict], list[str] | None]


class RowError(ValueError):
    """A row cannot be used; the message states the reason, in words that can follow "because"."""


@dataclass
class Sieve:
    """How to treat rows that cannot be used, and what was found about rows so far."""

    split: str = "training"  # or "held-out", for messages
    dataset: str = ""  # the data set's name, if there are several
    invalid: str = "raise"  # or "drop"
    notes: list[str] = field(default_factory=list)  # sentences about what was left out
    dropped: int = 0
    cut: int = 0  # rows longer than `data.max_length`

    @property
    def examples(self) -> str:
        """The name of these examples in messages."""
        return f"{self.split} examples" + (f" of {self.dataset}" if self.dataset else "")

    def refuse(self, message: str) -> None:
        """Raise ValueError for rows that cannot be used, unless they are to be dropped."""
        if self.invalid == "raise":
            raise ValueError(
                f"data: cannot train on {message}. Repair the data, or leave such examples out "
                "with data.invalid: drop"
            )


def numbered(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return `dataset` with a column of row numbers, which stay with their rows when shuffled."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row, i: {ROW: i + 1}, with_indices=True)
    return dataset.add_column(ROW, list(range(1, len(dataset) + 1)))


def columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the names of the source's columns; if a stream declares none, those of its first
    row."""
    names = dataset.column_names or list(next(iter(dataset), {}))
    return [name for name in names if name != ROW]


def checked(dataset: Dataset, check_row: RowCheck, sieve: Sieve, num_proc: int | None) -> Dataset:
    """Return the rows for which `check_row` raises no RowError."""

    def verdict(example: dict) -> dict:
        try:
            return {"flaw": "", "unshown": ", ".join(check_row(example) or ())}
        except RowError as error:
            return {"flaw": str(error), "unshown": ""}

    found = dataset.map(
        verdict, remove_columns=dataset.column_names, num_proc=num_proc, desc="Checking examples"
    )
    flaws = found["flaw"][:]
    kept = without_flawed(dataset, flaws, sieve)
    note_unshown((u for u, flaw in zip(found["unshown"], flaws, strict=True) if not flaw), sieve)
    return kept


def converted(
    dataset: Dataset,
    convert: Callable[[dict], dict],
    sieve: Sieve,
    num_proc: int | None,
    *,
    replaced: Iterable[str],
    desc: str,
) -> Dataset:
    """Return the rows for which `convert` raises no RowError; its result replaces the columns
    `replaced`."""

    def check_row(example: dict) -> None:
        convert(example)

    dataset = checked(dataset, check_row, sieve, num_proc)
    present = [name for name in replaced if name in dataset.column_names]
    return dataset.map(convert, remove_columns=present, desc=desc)


def note_unshown(unshown: Iterable[str], sieve: Sieve) -> None:
    """Add notes about fields that the chat template does not show; each row's joined by commas."""
    for name, count in Counter(n for names in unshown if names for n in names.split(", ")).items():
        sieve.notes.append(
            f"the chat template does not show the `{name}` of {count} {sieve.examples}; it is not "
            "trained on"
        )


def check_text(name: str, text: Any, *, may_be_empty: bool = False) -> None:
    """Raise RowError for a value of column `name` that is neither text nor chat messages."""
    if text is None:
        raise RowError(f"`{name}` is missing")
    if isinstance(text, list):
        for i, message in enumerate(text, 1):
            if flaw := _message_flaw(message):
                raise RowError(f"message {i} of `{name}` {flaw}")
        is_empty = not any(m.get("content") or m.get("tool_calls") for m in text)
    elif isinstance(text, str):
        is_empty = not text.strip() and not may_be_empty
    else:
        raise RowError(f"`{name}` is {text!r}, which is neither text nor a list of messages")
    if is_empty:
        raise RowError(f"`{name}` is empty")


def _message_flaw(message: Any) -> str:
    if not isinstance(message, dict):
        return f"is {message!r}, not a role with content"
    if not isinstance(message.get("role"), str):
        return "has no role"
    content = message.get("content")
    if content is None:
        return "" if message.get("tool_calls") else "has no content"
    return "" if isinstance(content, (str, list)) else f"has the content {content!r}, no text"


def without_flawed(dataset: Dataset, flaws: list[str], sieve: Sieve) -> Dataset:
    """Return the rows of `dataset` whose entry in `flaws` is empty.

    Raises ValueError for the first flawed row unless `sieve` drops such rows, and if no row is
    left.
    """
    found = [i for i, flaw in enumerate(flaws) if flaw]
    if not found:
        return dataset
    first = found[0]
    message = (
        f"{len(found)} of {len(flaws)} {sieve.examples}, the first in row {dataset[first][ROW]} "
        f"because {flaws[first]}"
    )
    if len(found) == len(flaws):
        raise ValueError(f"data: nothing is left: cannot train on {message}")
    sieve.refuse(message)
    sieve.dropped += len(found)
    sieve.notes.append(f"left out {message}")
    return dataset.select([i for i, flaw in enumerate(flaws) if not flaw])


def encoded_stream(
    rows: IterableDataset,
    replaced: list[str],
    encode: Callable[[dict], dict],
    sieve: Sieve,
    **options,
) -> IterableDataset:
    """Return what `encode` makes of each row of a stream, in place of the columns `replaced`.

    A row for which its `flaw` is not empty raises ValueError when it is read, or is dropped.
    `options` are those of `IterableDataset.map`.
    """

    def encode_or_refuse(row: dict) -> dict:
        found = encode(row)
        if found["flaw"]:
            sieve.refuse(f"row {row[ROW]} of the {sieve.examples} because {found['flaw']}")
        return found

    found = rows.map(encode_or_refuse, remove_columns=[*replaced, ROW], **options)
    return found.filter(lambda row: not row["flaw"])
