"""The `data` section of a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_trainer.runs.data.builtin import LOADERS
from liger_trainer.runs.data.forms import NAMES as FORMS
from liger_trainer.runs.typed import filled

ENDINGS = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
# Keys of the section `data` that each entry of `data.mix` sets for itself.
_OF_ENTRIES = ("path", "loader", "name", "columns", "form")
_AT_LEAST = {"samples": 0, "num_proc": 1, "shuffle_buffer": 1, "max_length": 2, "max_examples": 2}
_NOT_STREAMED = {
    "packing": "remove the key: which examples share a row is known once all lengths are",
    "eval_fraction": "hold out a file or a split of its own: data.eval_path or data.eval_split",
    "num_proc": "use training.dataloader_num_workers",
}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")  # formats that `datasets` reads


def type_of(path: str | Path) -> str | None:
    """Return the type of a file by its suffix, which a compression's suffix may follow."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return FILE_TYPES.get(suffixes[-1]) if suffixes else None


def is_file_name(path: str) -> bool:
    """Return whether a path names a file of a supported type, not a hub's dataset or a folder."""
    return type_of(path) is not None


@dataclass(frozen=True)
class Source:
    """One data set: an entry of `data.mix`, or what the section `data` itself names."""

    path: str | list[str] | None = None  # this or `loader`
    loader: str | None = None
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    form: str | None = None
    weight: float | None = None  # relative share of rows; without weights, every row once

    @property
    def label(self) -> str:
        """The name of the data set in messages."""
        if isinstance(self.path, list):
            return self.path[0] + (f" and {len(self.path) - 1} more" if self.path[1:] else "")
        return self.path or self.loader or ""

    def check(self, where: str) -> None:
        """Raise ValueError for values that contradict each other; `where` names the keys."""
        if (self.path is None) == (self.loader is None):
            raise ValueError(
                f"{where}: set exactly one of {where}.path (a hub name, a folder or files) and "
                f"{where}.loader ({', '.join(LOADERS)})"
            )
        if self.path == [] or not all(isinstance(p, str) for p in self.paths):
            raise ValueError(f"{where}.path: {self.path!r} is neither a path nor a list of paths")
        if self.loader is not None and self.loader not in LOADERS:
            raise ValueError(
                f"{where}.loader: no loader {self.loader!r}; the loaders are {', '.join(LOADERS)}"
            )
        if self.name is not None and (self.loader or any(map(is_file_name, self.paths))):
            raise ValueError(
                f"{where}.name is a configuration of a dataset on the hub, and {self.label} has "
                "none; remove the key"
            )
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"{where}.form: {self.form!r} is none of {', '.join(FORMS)}")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"{where}.weight is {self.weight}; it must be above 0")

    @property
    def paths(self) -> list[str]:
        """All paths, or none for a loader."""
        if self.path is None:
            return []
        return self.path if isinstance(self.path, list) else [self.path]


@dataclass(frozen=True)
class DataArguments:
    """The `data` section.

    Exactly one of `path`, `loader` and `mix` is set, and at most one of the three `eval_` fields.
    """

    # hub name, folder, or .json, .jsonl, .csv, .parquet files (also .gz): one, a list, a glob
    path: str | list[str] | None = None
    loader: str | None = None  # one of LOADERS, which come with this package
    # several data sets; each has path or loader, and optional name, split, columns, form, weight
    mix: list[dict[str, Any]] | None = None
    # when a weighted mix ends, as in datasets.interleave_datasets: at the end of the first data
    # set, or of all (all_exhausted, which repeats rows, or all_exhausted_without_replacement)
    mix_until: str = "first_exhausted"
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # or a slice of one: train[:90%]
    # files or a data set with held-out examples
    eval_path: str | list[str] | None = None
    eval_split: str | None = None  # held-out split of the same data set
    eval_fraction: float | None = None  # share of `split` to hold out, chosen with the seed
    columns: dict[str, str] | None = None  # {prompt: question}: expected name, then yours
    form: str | None = None  # the form of a row, if its columns fit more than one
    max_examples: int | None = None  # of each data set, after shuffling with the seed
    max_length: int = 2048  # tokens per example; longer ones are truncated
    packing: bool = False  # several examples share a row, without attending to each other
    assistant_only: bool = True  # train on assistant turns and completions only
    streaming: bool = False  # read while training, for data larger than memory and disk
    shuffle_buffer: int = 10_000  # rows in the shuffle buffer of a stream
    num_proc: int | None = None  # processes for tokenization
    # rows with equal values in this column stay on one side of `eval_fraction`
    group: str | None = None
    samples: int = 3  # held-out examples whose completions the report shows, before and after
    invalid: str = "raise"  # rows that cannot be trained on: "raise", or "drop" and count them

    def __post_init__(self):
        self._check_sources()
        self._check_held_out()
        if self.invalid not in ("raise", "drop"):
            raise ValueError(f"data.invalid: {self.invalid!r} is neither 'raise' nor 'drop'")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}")
        if self.streaming:
            self._check_stream()

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out examples."""
        return bool(self.eval_path or self.eval_split or self.eval_fraction)

    @property
    def sources(self) -> list[Source]:
        """The data sets that are trained on."""
        if self.mix is None:
            return [Source(self.path, self.loader, self.name, self.split, self.columns, self.form)]
        return [filled(f"data.mix[{i}]", entry, Source) for i, entry in enumerate(self.mix)]

    @property
    def eval_sources(self) -> list[Source]:
        """The data sets that are held out as a whole; empty if a fraction or nothing is."""
        if self.eval_split:
            return [dataclasses.replace(s, split=self.eval_split) for s in self.sources]
        if self.eval_path:
            return [Source(self.eval_path, None, self.name, columns=self.columns, form=self.form)]
        return []

    def _check_sources(self) -> None:
        if self.mix is None:
            self.sources[0].check("data")
            return
        given = [key for key in _OF_ENTRIES if getattr(self, key) is not None]
        given += ["split"] if self.split != "train" else []
        if given:
            raise ValueError(f"data.{given[0]}: with data.mix, set it in the entries of the mix")
        if not self.mix:
            raise ValueError("data.mix is empty; list the data sets, each with its path")
        for i, source in enumerate(self.sources):
            source.check(f"data.mix[{i}]")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"data.mix[{weighted.index(False)}]: no weight, but others have one; give each "
                "data set a weight, or none"
            )
        if self.mix_until not in ENDINGS:
            raise ValueError(f"data.mix_until: {self.mix_until!r} is none of {', '.join(ENDINGS)}")

    def _check_held_out(self) -> None:
        held_out = [n for n in ("eval_path", "eval_split", "eval_fraction") if getattr(self, n)]
        if len(held_out) > 1:
            raise ValueError(f"data: {' and '.join(held_out)} are both set; keep one")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"data.eval_fraction is {self.eval_fraction}; it must lie between 0 and 1"
            )
        if self.group is not None and not self.eval_fraction:
            raise ValueError("data.group: it requires data.eval_fraction, which is not set")

    def _check_stream(self) -> None:
        for key, advice in _NOT_STREAMED.items():
            if getattr(self, key):
                raise ValueError(f"data.{key}: not for data.streaming; {advice}")
        for source in self.sources:
            if "[" in source.split:
                raise ValueError(
                    f"data.split: a stream has no slice such as {source.split!r}; take a whole "
                    "split, or as many rows as data.max_examples says"
                )
        if len(self.sources) > 1 and self.sources[0].weight is None:
            raise ValueError(
                "data.mix: streams have no known length, so give each of them a weight"
            )
