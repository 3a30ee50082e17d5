"""The `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from liger_trainer.runs.data.builtin import LOADERS


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
