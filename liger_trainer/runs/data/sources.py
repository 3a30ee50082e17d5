"""Load data sets from files, a folder, a hub, or this package."""

from __future__ import annotations

import glob
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from liger_trainer.runs.data.arguments import FILE_TYPES, Source, is_file_name, type_of
from liger_trainer.runs.data.builtin import LOADERS
from liger_trainer.runs.data.rows import columns, numbered
from liger_trainer.runs.files import suggest_path

_NO_ROWS = "corresponds to no data"  # in the message of `datasets`
_SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` writes one of these to its folder


def load_source(source: Source, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Return one split of a source, with columns renamed by `source.columns` and rows `numbered`.

    Raises FileNotFoundError for a missing file and ValueError for an unreadable or empty one.
    """
    dataset = _opened(source, streaming)
    if next(iter(dataset), None) is None if streaming else len(dataset) == 0:
        raise ValueError(f"data: {source.label} has no examples in split {source.split!r}")
    names = columns(dataset)
    for ours, theirs in (source.columns or {}).items():
        if theirs not in names:
            raise ValueError(
                f"data.columns.{ours}: no column {theirs!r}; the dataset has {', '.join(names)}"
            )
        if ours in names and ours != theirs:
            dataset = dataset.remove_columns(ours)
        dataset = dataset.rename_column(theirs, ours)
    return numbered(dataset)


def first_rows(source: Source, count: int, *, streaming: bool) -> Dataset:
    """Return the first rows of `load_source`; of a stream, no more rows are read."""
    rows = load_source(source, streaming=streaming)
    if streaming:
        return Dataset.from_list(list(rows.take(count)))
    return rows.select(range(min(count, len(rows))))


def is_saved(path: str) -> bool:
    """Return whether a path is a folder that `save_to_disk` wrote."""
    return any((Path(path) / name).is_file() for name in _SAVED)


def files_of(source: Source) -> list[Path]:
    """Return the files of a source, with globs expanded and sorted.

    Empty for a folder, a hub's data set or a loader. Raises FileNotFoundError for a missing file,
    or a glob without matches.
    """
    if not isinstance(source.path, list) and not all(map(is_file_name, source.paths)):
        return []
    found = []
    for path in source.paths:
        if not is_file_name(path):
            raise ValueError(
                f"data: {path!r} in a list is none of {', '.join(FILE_TYPES)} files; "
                "several data sets are the entries of data.mix"
            )
        if Path(path).is_file():
            found.append(Path(path))
        elif glob.has_magic(path):
            matches = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
            if not matches:
                raise FileNotFoundError(f"data: no file matches {path!r}")
            found += map(Path, matches)
        else:
            raise FileNotFoundError(f"data: no file {path!r}{suggest_path(Path(path))}")
    return found


def _opened(source: Source, streaming: bool) -> Dataset | IterableDataset:
    if source.loader is not None:
        dataset = _part({"train": LOADERS[source.loader]()}, source.split, source.loader)
    elif files := files_of(source):
        return _load_files(files, source.split, streaming)
    elif is_saved(source.path):
        dataset = _load_saved(source.path, source.split)
    else:
        return _load_named(source, streaming)
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_named(source: Source, streaming: bool) -> Dataset | IterableDataset:
    """Return a dataset of a hub or a folder. Raises ValueError, in one line, if it cannot load."""
    path = Path(source.path)
    if path.is_file():
        raise ValueError(f"data: {path} is none of {', '.join(FILE_TYPES)} files")
    try:
        return load_dataset(source.path, source.name, split=source.split, streaming=streaming)
    except (DatasetGenerationError, ValueError, OSError) as error:
        hint = "" if path.exists() else f". If it is a file: there is none{suggest_path(path)}"
        raise ValueError(
            f"data: {source.path} cannot be loaded: {_reason(error).rstrip('.')}{hint}"
        ) from error


def _load_saved(path: str, split: str) -> Dataset:
    """Return a split, or a slice of one, of a folder that `save_to_disk` wrote."""
    try:
        saved = load_from_disk(path)
    except (ValueError, FileNotFoundError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"data: {path} cannot be loaded: {_reason(error)}") from error
    return _part(saved if isinstance(saved, DatasetDict) else {"train": saved}, split, path)


def _part(splits: dict, split: str, label: str) -> Dataset:
    """Return one of `splits`, or a slice of it."""
    if split.split("[")[0] not in splits:
        raise ValueError(
            f"data: {label} has no split {split!r}; the splits are {', '.join(map(str, splits))}"
        )
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data: {label}: {error}") from error
    return splits[part.splitname].select(range(part.from_, part.to))


def _load_files(files: list[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    if split.split("[")[0] != "train":
        raise ValueError(
            f"data: a single file has the split `train` only (or a slice of it such as "
            f"`train[:90%]`), not {split!r}; held-out examples in a second file are data.eval_path"
        )
    kinds = sorted({type_of(path) for path in files})
    if len(kinds) > 1:
        raise ValueError(
            f"data: files of {' and '.join(kinds)} in one list; make them entries of data.mix"
        )
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"data: {path} is empty")
    names = list(map(str, files))
    try:
        dataset = load_dataset(kinds[0], data_files=names, split=split, streaming=streaming)
        if streaming:
            next(iter(dataset), None)  # read the first row now, to find errors
        else:
            dataset.data.validate(full=True)  # text that is not UTF-8
        return dataset
    except (DatasetGenerationError, ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"data: {' or '.join(names)} cannot be read as {kinds[0]}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    if _NO_ROWS in str(error):
        return "it has no examples"
    return " ".join(str(error.__cause__ or error).split())
