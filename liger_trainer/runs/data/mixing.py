"""Several data sets in one, drawn by weight."""

from __future__ import annotations

from collections import Counter

from datasets import Dataset, IterableDataset, Json, concatenate_datasets, interleave_datasets

_OPTIONS = "chat_template_kwargs"
SOURCE = "__source__"  # temporary column with the index of a row's data set


def concatenated(parts: list[Dataset], labels: list[str]) -> Dataset:
    """Return all rows of all parts, one part after the other. Raises ValueError as `mixed` does."""
    return parts[0] if len(parts) == 1 else concatenate_datasets(_aligned(parts, labels))


def mixed(
    parts: list[Dataset] | list[IterableDataset],
    weights: list[float | None],
    labels: list[str],
    *,
    until: str,
    seed: int,
    notes: list[str],
) -> Dataset | IterableDataset:
    """Return rows of all parts, mixed by weight; without weights, every row once, shuffled.

    With weights, each row comes from part `i` with probability `weights[i] / sum(weights)`, drawn
    with `seed`; rows of one part stay in order.

    Args:
        labels: the parts' names, for messages.
        until: when to stop, the `stopping_strategy` of `datasets.interleave_datasets`.
        notes: receives a sentence about how many rows were drawn from each part.

    Raises ValueError if columns of the same name have types that do not fit each other.
    """
    if len(parts) == 1:
        return parts[0]
    if weights[0] is None:
        return concatenated(parts, labels).shuffle(seed=seed)
    drawing = {
        "probabilities": [weight / sum(weights) for weight in weights],
        "seed": seed,
        "stopping_strategy": until,
    }
    if isinstance(parts[0], IterableDataset):
        return interleave_datasets(parts, **drawing)
    parts = _aligned(parts, labels)
    marked = [part.add_column(SOURCE, [i] * len(part)) for i, part in enumerate(parts)]
    whole = interleave_datasets(marked, **drawing)
    drawn = Counter(whole[SOURCE])
    shares = ", ".join(
        f"{drawn[i]} from the {len(part)} of {label}"
        for i, (part, label) in enumerate(zip(parts, labels, strict=True))
    )
    notes.append(f"mixed {len(whole)} training rows: {shares}")
    return whole.remove_columns(SOURCE)


def _aligned(parts: list[Dataset], labels: list[str]) -> list[Dataset]:
    """Return the parts with the same type for each column.

    When parts are joined, a missing column is filled with None. For `chat_template_kwargs`, which
    TRL unpacks in every row, it is filled with empty arguments instead.
    """
    if any(isinstance(part.features.get(_OPTIONS), Json) for part in parts):
        parts = [part if _OPTIONS in part.features else _without_options(part) for part in parts]
    for name in dict.fromkeys(name for part in parts for name in part.features):
        parts = _unified(parts, labels, name)
    return parts


def _without_options(part: Dataset) -> Dataset:
    features = part.features.copy()
    features[_OPTIONS] = Json()
    return part.map(lambda row: {_OPTIONS: {}}, features=features)


def _unified(parts: list[Dataset], labels: list[str], name: str) -> list[Dataset]:
    """Return the parts with the first of their types for a column that all can be cast to.

    Messages may have more keys in one data set than in another, or be JSON in a third.
    """
    found = {
        label: part.features[name]
        for label, part in zip(labels, parts, strict=True)
        if name in part.features
    }
    for kind in found.values():
        try:
            return [
                part.cast_column(name, kind) if part.features.get(name, kind) != kind else part
                for part in parts
            ]
        except (ValueError, TypeError, NotImplementedError):  # includes Arrow's errors
            continue
    types = " and ".join(f"{kind} in {label}" for label, kind in found.items())
    raise ValueError(f"data.mix: the column {name!r} is {types}; bring them to one form")
