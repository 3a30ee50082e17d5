"""The `data` section: where examples come from, how they are split, tokenized and batched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from liger_trainer.runs.collate import PackedDataset
from liger_trainer.runs.loaders import GROUPS, LOADERS
from liger_trainer.runs.preference import prepare_examples
from liger_trainer.runs.tokenize import IGNORE_INDEX, detect_format, encoder

_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class DataArguments:
    """The `data` section.

    Exactly one of `path` and `loader` is set, and at most one of the three `eval_` fields.
    """

    path: str | None = None  # hub name, folder, or .json, .jsonl, .csv, .parquet file
    loader: str | None = None  # one of LOADERS, which come with this package
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float | None = None  # share of `split` that is held out, by the seed
    columns: dict[str, str] | None = None  # {prompt: question}: our name to the dataset's
    max_examples: int | None = None
    max_length: int = 2048
    packing: bool = False
    assistant_only: bool = True  # train on assistant turns and completions alone
    num_proc: int | None = None
    # Column whose equal values stay on one side of `eval_fraction`: pairs of one prompt, say.
    group: str | None = None
    invalid: str = "error"  # preference examples that cannot be trained on: "error" or "drop"

    def __post_init__(self):
        if (self.path is None) == (self.loader is None):
            raise ValueError(
                "data: set exactly one of data.path (a hub name or a file) and data.loader "
                f"({', '.join(LOADERS)})"
            )
        if self.loader is not None and self.loader not in LOADERS:
            raise ValueError(
                f"data.loader: no loader {self.loader!r}; there is {', '.join(LOADERS)}"
            )
        held_out = [n for n in ("eval_path", "eval_split", "eval_fraction") if getattr(self, n)]
        if len(held_out) > 1:
            raise ValueError(f"data: {' and '.join(held_out)} are both set; keep one")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"data.eval_fraction is {self.eval_fraction}; it must lie between 0 and 1"
            )
        if self.group is not None and not self.eval_fraction:
            raise ValueError("data.group: it is for data.eval_fraction, which is not set")
        if self.invalid not in ("error", "drop"):
            raise ValueError(f"data.invalid: {self.invalid!r} is neither 'error' nor 'drop'")
        for name in ("max_length", "max_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 2")


@dataclass(frozen=True)
class Prepared:
    """Datasets for the trainer, and what was left out on the way."""

    train: Any
    eval: Any | None
    kind: str  # the format that was found
    notes: tuple[str, ...]


def load_splits(data: DataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and held-out examples, untokenized; shuffled and split by `seed`.

    Raises FileNotFoundError for a missing file and ValueError for an unreadable or empty one.
    """
    train = _load(data, data.path, data.split)
    held_out = None
    if data.eval_path:
        held_out = _load(data, data.eval_path, "train")
    elif data.eval_split:
        held_out = _load(data, data.path, data.eval_split)
    train = train.shuffle(seed=seed)
    if data.max_examples is not None:
        train = train.select(range(min(data.max_examples, len(train))))
    if data.eval_fraction:
        train, held_out = _split(train, data)
    return train, held_out


def _split(dataset: Dataset, data: DataArguments) -> tuple[Dataset, Dataset]:
    """The first rows, and the last `eval_fraction`; rows of one group go the same way."""
    group = data.group or GROUPS.get(data.loader)
    if group is None:
        keys = list(range(len(dataset)))
    elif group in dataset.column_names:
        keys = dataset[group][:]
    else:
        raise ValueError(
            f"data.group: no column {group!r}; the dataset has {', '.join(dataset.column_names)}"
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


def prepare(
    data: DataArguments, tokenizer, *, seed: int, examples: str = "text", needed: Iterable[str] = ()
) -> Prepared:
    """Loads and splits; text is tokenized and, if asked to, packed, other examples are checked.

    Args:
        examples: what the method trains on, `Method.examples`. All but "text" are tokenized by the
            method's trainer.
        needed: columns that have to be there besides the examples', for reward functions.

    Raises ValueError when no format is recognised, when no example has a label left, and for
    preference examples that cannot be trained on.
    """
    train, held_out = load_splits(data, seed)
    if examples != "text":
        options = {"kind": examples, "needed": needed, "invalid": data.invalid, "seed": seed}
        options |= {"max_length": data.max_length, "num_proc": data.num_proc}
        notes: list[str] = []
        train = prepare_examples(train, tokenizer, what="training", notes=notes, **options)
        if held_out is not None:
            held_out = prepare_examples(
                held_out, tokenizer, what="held-out", notes=notes, **options
            )
        return Prepared(train, held_out, examples, tuple(notes))
    kind, notes = detect_format(train.column_names), []
    train = _tokenize(data, tokenizer, kind, train, "training", notes)
    if held_out is not None:
        if detect_format(held_out.column_names) != kind:
            raise ValueError(f"data: training examples are {kind}, held-out ones are not")
        held_out = _tokenize(data, tokenizer, kind, held_out, "held-out", notes)
    if data.packing:
        train = PackedDataset(train, data.max_length)
        held_out = held_out and PackedDataset(held_out, data.max_length)
    return Prepared(train, held_out, kind, tuple(notes))


def _load(data: DataArguments, path: str | None, split: str) -> Dataset:
    """One split, with our column names."""
    if path is None:
        dataset = LOADERS[data.loader]()
    elif Path(path).suffix.lower() in _FILE_TYPES:
        dataset = _load_file(Path(path), split)
    else:
        dataset = load_dataset(path, data.name, split=split)
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
    return dataset


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
    except DatasetGenerationError as error:
        raise ValueError(
            f"data.path: {path} cannot be read as {kind}: {error.__cause__}"
        ) from error


def near(path: Path) -> str:
    """A sentence that says where a missing file was looked for and what is there instead."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [n for n in names if n.endswith(path.suffix)][:5]
    return f" in {path.parent}" + (f"; there is {', '.join(close)}" if close else "")


def _tokenize(data, tokenizer, kind: str, dataset: Dataset, what: str, notes: list[str]) -> Dataset:
    encode = encoder(
        tokenizer, kind=kind, max_length=data.max_length, assistant_only=data.assistant_only
    )
    total = len(dataset)
    dataset = dataset.map(
        encode,
        remove_columns=dataset.column_names,
        num_proc=data.num_proc,
        desc=f"Tokenizing {what} examples",
    )
    dataset = dataset.filter(_has_label, num_proc=data.num_proc, desc="Dropping unlabelled ones")
    dropped = total - len(dataset)
    advice = f"nothing to train on within data.max_length ({data.max_length} tokens)"
    if len(dataset) == 0:
        raise ValueError(
            f"data: all {total} {what} examples have {advice}: raise data.max_length, shorten the "
            "prompts, or set data.assistant_only to false"
        )
    if dropped:
        notes.append(f"left out {dropped} of {total} {what} examples, which have {advice}")
    return dataset


def _has_label(example: dict) -> bool:
    return any(label != IGNORE_INDEX for label in example["labels"])
