"""The `data` section: where examples come from, how they are split, tokenized and batched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, Features, Sequence, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from liger_trainer.runs.collate import PackedDataset
from liger_trainer.runs.loaders import GROUPS, LOADERS
from liger_trainer.runs.preference import prepare_examples
from liger_trainer.runs.rows import columns, numbered, text_flaw, without_flawed
from liger_trainer.runs.tokenize import COLUMNS, IGNORE_INDEX, RowError, detect_format, encoder

_IDS = Sequence(Value("int64"))
_ENCODED = Features({"input_ids": _IDS, "labels": _IDS, "flaw": Value("string")})
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class DataArguments:
    """The `data` section.

    Exactly one of `path` and `loader` is set, and at most one of the three `eval_` fields.
    """

    path: str | None = None  # hub name, folder, or .json, .jsonl, .csv, .parquet file
    loader: str | None = None  # one of LOADERS, which come with this package
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # or a slice of one: train[:90%]
    eval_path: str | None = None  # held-out examples in a file or data set of their own
    eval_split: str | None = None  # held-out split of the same data set
    eval_fraction: float | None = None  # share of `split` that is held out, by the seed
    columns: dict[str, str] | None = None  # {prompt: question}: our name to the dataset's
    max_examples: int | None = None  # after shuffling by the seed
    max_length: int = 2048  # tokens of an example; longer ones are cut
    packing: bool = False  # several examples fill a row; they do not attend to each other
    assistant_only: bool = True  # train on assistant turns and completions alone
    num_proc: int | None = None  # processes that tokenize
    # column whose equal values stay on one side of `eval_fraction`: pairs of one prompt, say
    group: str | None = None
    samples: int = 3  # held-out examples whose completions the report shows, before and after
    invalid: str = "raise"  # rows that cannot be trained on: "raise", or "drop" and count them

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
        if self.invalid not in ("raise", "drop"):
            raise ValueError(f"data.invalid: {self.invalid!r} is neither 'raise' nor 'drop'")
        if self.samples < 0:
            raise ValueError(f"data.samples is {self.samples}; it must be at least 0")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"data.num_proc is {self.num_proc}; it must be at least 1")
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
    digest: str  # of the source's contents: the same for the same rows in the same order


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


def prepare(
    data: DataArguments, tokenizer, *, seed: int, examples: str = "text", needed: Iterable[str] = ()
) -> Prepared:
    """Loads and splits; text is tokenized and, if asked to, packed, other examples are checked.

    Args:
        examples: what the method trains on, `Method.examples`. All but "text" are tokenized by the
            method's trainer.
        needed: columns that have to be there besides the examples', for reward functions.

    Raises ValueError when no format is recognized, when no example has a label left, and, unless
    `data.invalid` is "drop", for examples that cannot be trained on.
    """
    train, held_out, digest = load_splits(data, seed)
    kind, notes = format_of(train, examples), []
    if held_out is not None and format_of(held_out, examples) != kind:
        raise ValueError(f"data: training examples are {kind}, held-out ones are not")
    options = {"seed": seed, "notes": notes, "kind": kind, "needed": needed}
    train = fit(train, data, tokenizer, what="training", **options)
    if held_out is not None:
        held_out = fit(held_out, data, tokenizer, what="held-out", **options)
    if data.packing:
        train = PackedDataset(train, data.max_length)
        held_out = held_out and PackedDataset(held_out, data.max_length)
    return Prepared(train, held_out, kind, tuple(notes), digest)


def format_of(dataset: Dataset, examples: str) -> str:
    """What the examples are: a key of `tokenize.COLUMNS` for text, else `examples` itself."""
    return detect_format(columns(dataset)) if examples == "text" else examples


def fit(
    dataset: Dataset,
    data: DataArguments,
    tokenizer,
    *,
    kind: str,
    what: str,
    seed: int,
    notes: list[str],
    needed: Iterable[str] = (),
) -> Dataset:
    """The rows that can be trained on: text as ids and labels, other kinds as their trainers take
    them. Raises ValueError as `prepare` does."""
    if kind in COLUMNS:
        return _tokenize(data, tokenizer, kind, dataset, what, notes)
    return prepare_examples(
        dataset,
        tokenizer,
        kind=kind,
        what=what,
        notes=notes,
        max_length=data.max_length,
        invalid=data.invalid,
        needed=needed,
        seed=seed,
        num_proc=data.num_proc,
    )


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


def _tokenize(data, tokenizer, kind: str, dataset: Dataset, what: str, notes: list[str]) -> Dataset:
    encode = encoder(
        tokenizer, kind=kind, max_length=data.max_length, assistant_only=data.assistant_only
    )
    no_label = (
        f"there is nothing to train on within data.max_length ({data.max_length} tokens): raise "
        "it, shorten the prompts, or set data.assistant_only to false"
    )

    def encoded(example: dict) -> dict:
        flaw = _flaw(kind, example)
        found = {"input_ids": [], "labels": []}
        try:
            found = found if flaw else encode(example)
        except RowError as error:
            flaw = str(error)
        if not flaw and all(label == IGNORE_INDEX for label in found["labels"]):
            flaw = no_label
        return {**found, "flaw": flaw}

    source = dataset
    dataset = source.map(
        encoded,
        remove_columns=source.column_names,
        features=_ENCODED,
        num_proc=data.num_proc,
        desc=f"Tokenizing {what} examples",
    )
    flaws = dataset["flaw"][:]
    without_flawed(source, flaws, what=what, invalid=data.invalid, notes=notes)
    dataset = dataset.remove_columns("flaw")
    return dataset.select([i for i, f in enumerate(flaws) if not f]) if any(flaws) else dataset


def _flaw(kind: str, example: dict) -> str:
    """Why a row is not what its columns promise; empty if it is."""
    if kind == "text":
        text = example["text"]
        is_text = text is None or isinstance(text, str)
        return text_flaw("text", text) if is_text else f"`text` is {text!r}, which is not text"
    if kind == "messages":
        messages = example["messages"]
        if isinstance(messages, str):
            return "`messages` is text; name its column `text`, or give a list of messages"
        return text_flaw("messages", messages)
    return text_flaw("prompt", example["prompt"], may_be_empty=True) or text_flaw(
        "completion", example["completion"]
    )
