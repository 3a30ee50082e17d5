"""Data sets as they are at their source: a file, a folder, a hub, or this package."""

from __future__ import annotations

import difflib
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.builtin import LOADERS
from liger_trainer.runs.data.rows import numbered

_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_source(data: DataArguments, path: str | None, split: str) -> Dataset:
    """One split as it is in its source, with our column names and `numbered`."""
    if path is None:
        dataset = LOADERS[data.loader]()
    elif is_file_name(path):
        dataset = _load_file(Path(path), split)
    else:
        dataset = _load_named(path, data.name, split)
    if len(dataset) == 0:
        raise ValueError(f"data: {path or data.loader} holds no example in split {split!r}")
    for ours, theirs in (data.columns or {}).items():
        if theirs not in dataset.column_names:
            raise ValueError(
                f"data.columns.{ours}: no column {theirs!r}; the dataset has "
                + ", ".join(dataset.column_names)
            )
        if ours in dataset.column_names and ours != theirs:
            dataset = dataset.remove_columns(ours)
        dataset = dataset.rename_column(theirs, ours)
    return numbered(dataset)


def is_file_name(path: str) -> bool:
    """Whether a path names a file of a kind that is read here, not a hub's dataset or a folder."""
    return Path(path).suffix.lower() in _FILE_TYPES


def _load_named(path: str, name: str | None, split: str) -> Dataset:
    """A dataset of a hub or a folder. Raises ValueError for an unknown one, in one line."""
    try:
        return load_dataset(path, name, split=split)
    except (DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data.path: {path} cannot be loaded: {reason}") from error


def _load_file(path: Path, split: str) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"data.path: no file {str(path)!r}{near(path)}")
    if split.split("[")[0] != "train":
        raise ValueError(
            f"data.split: a single file has the split `train` only (or a slice of it such as "
            f"`train[:90%]`), not {split!r}; held-out examples in a second file are data.eval_path"
        )
    kind = _FILE_TYPES[path.suffix.lower()]
    if path.stat().st_size == 0:
        raise ValueError(f"data.path: {path} is empty")
    try:
        return load_dataset(kind, data_files=str(path), split=split)
    except (DatasetGenerationError, ValueError) as error:  # ArrowInvalid is one of the latter
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data.path: {path} cannot be read as {kind}: {reason}") from error


def near(path: Path) -> str:
    """A sentence that says where a missing file was looked for and what is there instead."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [n for n in names if n.endswith(path.suffix)][:5]
    return f" in {path.parent}" + (f"; there is {', '.join(close)}" if close else "")
