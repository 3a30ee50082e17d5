"""Examples to batches: padding on the right, or several examples packed into one row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from liger_trainer.runs.data.tokenize import IGNORE_INDEX


class PackedDataset(torch.utils.data.Dataset):
    """Rows of whole examples, at most `max_length` tokens each, packed by best fit decreasing.

    `position_ids` restart with every example. Without an attention mask and a cache, transformers
    treats a restart as the border between sequences, so no example attends to another.
    """

    def __init__(self, dataset, max_length: int):
        self.dataset = dataset
        self.rows = best_fit([len(ids) for ids in dataset["input_ids"]], max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = {"input_ids": [], "labels": [], "position_ids": []}
        for example in (self.dataset[i] for i in self.rows[index]):
            row["input_ids"] += example["input_ids"]
            row["labels"] += example["labels"]
            row["position_ids"] += range(len(example["input_ids"]))
        return row


def unpacked(rows: Any) -> Iterator[dict[str, Any]]:
    """Return the examples of a data set, before packing if it is packed."""
    return iter(rows.dataset if isinstance(rows, PackedDataset) else rows)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return bins of indices of `lengths`, whose lengths sum to at most `capacity`.

    The longest are placed first, each in the fullest bin that has room.
    """
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (remaining capacity, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(space, (lengths[i], -1))
        if at == len(space):
            bins.append([])
            left, target = capacity, len(bins) - 1
        else:
            left, target = space.pop(at)
        bins[target].append(i)
        insort(space, (left - lengths[i], target))
    return bins


@dataclass(frozen=True)
class Collator:
    """Collate examples to tensors [batch, longest], padded on the right.

    Plain examples get an attention mask. Packed rows get `position_ids` and no mask; their padding
    is one more sequence. `flatten` joins packed rows into one row [1, total] without padding, the
    only packed form that FlashAttention keeps apart. If several `ranks` share a row (context or
    sequence parallelism), it gets positions and a length that can be split, but no mask: these
    ranks ignore it, and padding comes last.
    """

    pad_token_id: int
    flatten: bool = False
    ranks: int = 1

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in examples[0]
        names = ["input_ids", "labels", *(["position_ids"] if packed else [])]
        if packed and self.flatten:
            return {n: torch.tensor([[i for e in examples for i in e[n]]]) for n in names}
        longest = max(len(e["input_ids"]) for e in examples)
        if self.ranks > 1:  # each rank takes two pieces of a row, to balance causal attention
            longest += -longest % (2 * self.ranks)
        missing = [longest - len(e["input_ids"]) for e in examples]
        fill = {
            "input_ids": lambda n: [self.pad_token_id] * n,
            "labels": lambda n: [IGNORE_INDEX] * n,
            "position_ids": lambda n: list(range(n)),
        }
        batch = {
            name: torch.tensor(
                [e[name] + fill[name](n) for e, n in zip(examples, missing, strict=True)]
            )
            for name in names
        }
        if self.ranks > 1:
            batch["position_ids"] = torch.arange(longest).repeat(len(examples), 1)
        elif not packed:
            batch["attention_mask"] = torch.tensor([[1] * (longest - n) + [0] * n for n in missing])
        return batch
