"""Training and held-out examples, shuffled and split by a seed."""

from __future__ import annotations

import xxhash
from datasets import Dataset

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.builtin import GROUPS
from liger_trainer.runs.data.rows import columns
from liger_trainer.runs.data.sources import load_source


def load_splits(data: DataArguments, seed: int) -> tuple[Dataset, Dataset | None, str]:
    """Training and held-out examples, untokenized and `numbered`, and a digest of their source;
    shuffled and split by `seed`.

    Raises FileNotFoundError for a missing file and ValueError for an unreadable or empty one.
    """
    train, held_out = load_source(data, data.path, data.split), None
    if data.eval_path:
        held_out = load_source(data, data.eval_path, "train")
    elif data.eval_split:
        held_out = load_source(data, data.path, data.eval_split)
    digest = _digest(train) + (_digest(held_out) if held_out is not None else "")
    train = train.shuffle(seed=seed)
    if data.max_examples is not None:
        train = train.select(range(min(data.max_examples, len(train))))
    if data.eval_fraction:
        train, held_out = _split(train, data)
    return train, held_out, digest


def _digest(dataset: Dataset) -> str:
    """A hash of all rows, before any of them is moved."""
    found = xxhash.xxh3_64()
    for batch in dataset.data.to_batches():
        found.update(batch.serialize())
    return found.hexdigest()


def _split(dataset: Dataset, data: DataArguments) -> tuple[Dataset, Dataset]:
    """The first rows, and the last `eval_fraction`; rows of one group go the same way."""
    group = data.group or GROUPS.get(data.loader)
    if group is None:
        keys = list(range(len(dataset)))
    elif group in dataset.column_names:
        keys = dataset[group][:]
    else:
        raise ValueError(
            f"data.group: no column {group!r}; the dataset has {', '.join(columns(dataset))}"
        )
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        one = "one example" if group is None else f"one value of {group!r}"
        raise ValueError(f"data.eval_fraction: {one} cannot be split; remove the key")
    count = min(max(1, round(len(distinct) * data.eval_fraction)), len(distinct) - 1)
    last = set(distinct[-count:])
    return (
        dataset.select([i for i, key in enumerate(keys) if key not in last]),
        dataset.select([i for i, key in enumerate(keys) if key in last]),
    )
