"""Training and held-out examples, shuffled and split by a seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import xxhash
from datasets import Dataset, IterableDataset

from liger_trainer.runs.data.arguments import DataArguments, Source
from liger_trainer.runs.data.builtin import GROUPS
from liger_trainer.runs.data.rows import columns
from liger_trainer.runs.data.sources import files_of, load_source


@dataclass(frozen=True)
class Part:
    """The rows of one data set, unconverted but `numbered`."""

    source: Source
    rows: Dataset | IterableDataset
    columns: list[str]  # read before shuffling: a shuffled stream fills a buffer to yield a row


@dataclass(frozen=True)
class Splits:
    """Training and held-out rows, a part for each data set."""

    train: list[Part]
    held_out: list[Part]
    digest: str  # of the contents: equal for equal rows in the same order


def load_splits(data: DataArguments, seed: int) -> Splits:
    """Return training and held-out examples, untokenized, shuffled and split with `seed`.

    The digest of a stream covers only the names and sizes of its files.

    Raises FileNotFoundError for a missing file and ValueError for an unreadable or empty one.
    """
    loaded = [part_of(s, load_source(s, streaming=data.streaming)) for s in data.sources]
    held_out = [part_of(source, load_source(source)) for source in data.eval_sources]
    digest = "".join(_digest(part) for part in loaded + held_out)
    train = []
    for part in loaded:
        rows = _shuffled(part.rows, data, seed)
        if data.eval_fraction:
            rows, last = _split(rows, data, part.source)
            held_out.append(replace(part, rows=last))
        train.append(replace(part, rows=rows))
    return Splits(train, held_out, digest)


def part_of(source: Source, rows: Dataset | IterableDataset) -> Part:
    """Return the rows of a source, with its columns."""
    return Part(source, rows, columns(rows))


def _shuffled(
    rows: Dataset | IterableDataset, data: DataArguments, seed: int
) -> Dataset | IterableDataset:
    """Return the rows shuffled, at most `data.max_examples` of them."""
    if data.streaming:
        rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        return rows if data.max_examples is None else rows.take(data.max_examples)
    rows = rows.shuffle(seed=seed)
    if data.max_examples is None:
        return rows
    return rows.select(range(min(data.max_examples, len(rows))))


def _digest(part: Part) -> str:
    """Return a hash of all rows in their original order."""
    digest = xxhash.xxh3_64()
    if isinstance(part.rows, IterableDataset):
        sizes = [(path.name, path.stat().st_size) for path in files_of(part.source)]
        digest.update(json.dumps(sizes or part.source.label).encode())
        return digest.hexdigest()
    for batch in part.rows.data.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _split(dataset: Dataset, data: DataArguments, source: Source) -> tuple[Dataset, Dataset]:
    """Return the first rows, and the last `eval_fraction`; a group's rows stay together."""
    group = data.group or GROUPS.get(source.loader)
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
    count = min(max(1, round(len(distinct) * (data.eval_fraction or 0.0))), len(distinct) - 1)
    last = set(distinct[-count:])
    return (
        dataset.select([i for i, key in enumerate(keys) if key not in last]),
        dataset.select([i for i, key in enumerate(keys) if key in last]),
    )
