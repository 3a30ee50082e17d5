"""Rows of a dataset that cannot be used: found one by one, named by number and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

ROW = "__row__"  # column with a row's number in its source, counted from 1


# Raises RowError for a row that cannot be used; returns what the chat template leaves out of it.
Judge = Callable[[dict], list[str] | None]


class RowError(ValueError):
    """A row that cannot be used; the message says why, to follow "because"."""


@dataclass
class Sieve:
    """What happens to rows that cannot be used, and what was found on the way."""

    what: str = "training"  # or "held-out", for messages
    of: str = ""  # the data set's name, where there are several
    invalid: str = "raise"  # or "drop"
    notes: list[str] = field(default_factory=list)  # sentences about what was left out
    dropped: int = 0
    cut: int = 0  # longer than `data.max_length`

    @property
    def examples(self) -> str:
        """The examples that it is about, for messages."""
        return f"{self.what} examples" + (f" of {self.of}" if self.of else "")

    def refuse(self, message: str) -> None:
        """Raise ValueError for rows that cannot be used, unless they are to be left out."""
        if self.invalid == "raise":
            raise ValueError(
                f"data: cannot train on {message}. Repair the data, or leave such examples out "
                "with data.invalid: drop"
            )


def numbered(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """`dataset` with the number of each row, which stays with it when rows are shuffled."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row, i: {ROW: i + 1}, with_indices=True)
    return dataset.add_column(ROW, list(range(1, len(dataset) + 1)))


def columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the names of the source's columns; those of a stream's first row where it declares
    none."""
    names = dataset.column_names or list(next(iter(dataset), {}))
    return [name for name in names if name != ROW]


def judged(dataset: Dataset, judge: Judge, sieve: Sieve, num_proc: int | None) -> Dataset:
    """Return the rows for which `judge` raises no RowError."""

    def judged(example: dict) -> dict:
        try:
            return {"flaw": "", "unshown": ", ".join(judge(example) or ())}
        except RowError as error:
            return {"flaw": str(error), "unshown": ""}

    found = dataset.map(
        judged, remove_columns=dataset.column_names, num_proc=num_proc, desc="Checking examples"
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
    """Return the rows for which `convert` raises no RowError, with what it gives in place of the
    columns `replaced`."""

    def judge(example: dict) -> None:
        convert(example)

    dataset = judged(dataset, judge, sieve, num_proc)
    present = [name for name in replaced if name in dataset.column_names]
    return dataset.map(convert, remove_columns=present, desc=desc)


def note_unshown(unshown: Iterable[str], sieve: Sieve) -> None:
    """Add a note about the fields (joined by commas) that chat templates left out of rows."""
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

    Raises ValueError for the first flawed row unless `sieve` leaves such rows out, and when no row
    is left.
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
