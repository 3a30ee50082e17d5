"""Rows of a dataset that cannot be used: found one by one, named by number and reason."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

ROW = "__row__"  # column with a row's number in its source, counted from 1


def numbered(dataset: Dataset) -> Dataset:
    """`dataset` with the number of each row, which stays with it when rows are shuffled."""
    return dataset.add_column(ROW, list(range(1, len(dataset) + 1)))


def columns(dataset: Dataset) -> list[str]:
    """The names of the source's columns."""
    return [name for name in dataset.column_names if name != ROW]


def text_flaw(name: str, text: Any, *, may_be_empty: bool = False) -> str:
    """Why the value of column `name` is neither text nor chat messages; empty if it is one."""
    if text is None:
        return f"`{name}` is missing"
    if isinstance(text, str):
        return "" if may_be_empty or text.strip() else f"`{name}` is empty"
    if not isinstance(text, list):
        return f"`{name}` is {text!r}, which is neither text nor a list of messages"
    for i, message in enumerate(text, 1):
        flaw = _message_flaw(message)
        if flaw:
            return f"message {i} of `{name}` {flaw}"
    if not any(message.get("content") or message.get("tool_calls") for message in text):
        return f"`{name}` is empty"
    return ""


def _message_flaw(message: Any) -> str:
    if not isinstance(message, dict):
        return f"is {message!r}, not a role with content"
    if not isinstance(message.get("role"), str):
        return "has no role"
    content = message.get("content")
    if content is None:
        return "" if message.get("tool_calls") else "has no content"
    return "" if isinstance(content, (str, list)) else f"has the content {content!r}, no text"


def without_flawed(
    dataset: Dataset, flaws: list[str], *, what: str, invalid: str, notes: list[str]
) -> Dataset:
    """The rows of `dataset` whose entry in `flaws` is empty.

    Args:
        what: "training" or "held-out", for messages.
        invalid: "raise" raises ValueError for the first flawed row, "drop" leaves them out.
        notes: gets a sentence about what was left out.

    Raises ValueError too when no row is left.
    """
    found = [i for i, flaw in enumerate(flaws) if flaw]
    if not found:
        return dataset
    first = found[0]
    message = (
        f"{len(found)} of {len(flaws)} {what} examples, the first in row {dataset[first][ROW]} "
        f"because {flaws[first]}"
    )
    if len(found) == len(flaws):
        raise ValueError(f"data: nothing is left: cannot train on {message}")
    if invalid == "raise":
        raise ValueError(
            f"data: cannot train on {message}. Repair the data, or leave such examples out with "
            "data.invalid: drop"
        )
    notes.append(f"left out {message}")
    return dataset.select([i for i, flaw in enumerate(flaws) if not flaw])
