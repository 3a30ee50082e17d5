"""What the model will see of prepared data: token ids, which of them are trained on, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from datasets import IterableDataset

from liger_trainer.runs.data.alignment import side_encoder, sides
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.collate import PackedDataset, unpacked
from liger_trainer.runs.data.conversation import prompt_ids
from liger_trainer.runs.data.prepare import Prepared
from liger_trainer.runs.data.tokenize import IGNORE_INDEX
from liger_trainer.runs.data.vision import VisionCollator

STREAMED = 1000  # rows of a stream that are counted
_QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Sequence:
    """One row of tokens as it reaches the model."""

    name: str  # the column of its example, such as `chosen`; empty if there is only one
    ids: list[int]
    trained: list[bool]
    length: int  # before truncation

    def runs(self) -> Iterator[tuple[list[int], bool]]:
        """Yield runs of ids that are all trained on, or all not."""
        tokens = zip(self.ids, self.trained, strict=True)
        for trained, stretch in groupby(tokens, key=itemgetter(1)):
            yield [i for i, _ in stretch], trained


@dataclass
class Counts:
    """Numbers of training or held-out examples."""

    examples: int = 0
    dropped: int = 0  # examples that cannot be used
    cut: int = 0  # sequences longer than `data.max_length`
    tokens: int = 0
    trained: int = 0  # tokens that have a label
    packed_rows: int | None = None
    lengths: dict[str, int] = field(default_factory=dict)  # quantiles of sequence lengths


def sequences(
    row: dict[str, Any], tokenizer, max_length: int, processor: Any | None = None
) -> list[Sequence]:
    """Return the sequences of one prepared row: two for a pair, else one."""
    if processor is not None:
        return _image_sequences(row, processor)
    if "input_ids" in row:
        return [_sequence("", row, len(row["input_ids"]))]
    if not {"chosen", "completion"} & set(row):
        ids = prompt_ids(row["prompt"], tokenizer)
        return [Sequence("prompt", ids, [False] * len(ids), len(ids))]
    names = ["chosen", "rejected"] if "chosen" in row else ["completion"]
    encode = side_encoder(tokenizer, max_length)
    found = zip(names, map(encode, sides(row)), strict=True)
    return [_sequence(name, encoded, encoded["length"]) for name, encoded in found]


def counts(prepared: Prepared, data: DataArguments, tokenizer, split: str) -> Counts:
    """Return counts of the "training" or "held-out" rows; for a stream, of its first rows only."""
    rows = prepared.train if split == "training" else prepared.eval
    sieves = [sieve for sieve in prepared.sieves if sieve.split == split]
    found = Counts(dropped=sum(s.dropped for s in sieves), cut=sum(s.cut for s in sieves))
    if isinstance(rows, PackedDataset):
        found.packed_rows = len(rows)
    lengths = []
    for row in islice(unpacked(rows), STREAMED if isinstance(rows, IterableDataset) else None):
        found.examples += 1
        for sequence in sequences(row, tokenizer, data.max_length, prepared.processor):
            lengths.append(len(sequence.ids))
            found.cut += sequence.length > len(sequence.ids)
            found.trained += sum(sequence.trained)
    found.tokens = sum(lengths)
    lengths.sort()
    last = len(lengths) - 1
    found.lengths = {name: lengths[round(q * last)] for name, q in _QUANTILES.items() if lengths}
    return found


def _sequence(name: str, encoded: dict[str, Any], length: int) -> Sequence:
    trained = [label != IGNORE_INDEX for label in encoded["labels"]]
    return Sequence(name, encoded["input_ids"], trained, length)


def _image_sequences(row: dict[str, Any], processor) -> list[Sequence]:
    """Return the sequences of a row with images, as its trainer's collator encodes them."""
    pairs = "chosen" in row
    batch = VisionCollator(processor, pairs)([row])
    found = []
    for i, name in enumerate(["chosen", "rejected"] if pairs else [""]):
        kept = batch["attention_mask"][i].bool()
        ids = batch["input_ids"][i][kept].tolist()
        trained = batch["completion_mask"][i] if pairs else batch["labels"][i] != IGNORE_INDEX
        found.append(Sequence(name, ids, trained[kept].bool().tolist(), len(ids)))
    return found
