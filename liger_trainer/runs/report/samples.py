"""Completions of held-out examples, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from liger_trainer.runs.data.collate import unpacked
from liger_trainer.runs.data.conversation import prompt_ids
from liger_trainer.runs.data.tokenize import IGNORE_INDEX

NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """A prompt as text and token ids, and the expected completion if the data has one."""

    prompt: str
    ids: list[int]
    expected: str = ""


def samples_of(dataset: Any, tokenizer, count: int) -> list[Sample]:
    """Return the first `count` examples of a prepared dataset that have a prompt.

    The prompt of a tokenized example is the part before its first label; others have a column
    `prompt`.
    """
    found = []
    for row in islice(unpacked(dataset), 4 * count):
        if "images" in row:
            return []  # token ids alone lack the images
        sample = _tokenized(row, tokenizer) if "labels" in row else _prompted(row, tokenizer)
        if sample.ids and len(found) < count:
            found.append(sample)
    return found


def complete(model, tokenizer, ids: list[int], new_tokens: int = NEW_TOKENS, **options) -> str:
    """Return the model's completion of `ids`, decoded greedily."""
    training = model.training
    model.eval()
    try:
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
    finally:
        model.train(training)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def shown(prompt: str | list[dict]) -> str:
    """Return a prompt as text to print."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in prompt)


def _tokenized(row: dict, tokenizer) -> Sample:
    labels, ids = row["labels"], row["input_ids"]
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    last = next((i for i, v in enumerate(labels) if i > first and v == IGNORE_INDEX), len(ids))
    prompt, expected = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:first], ids[first:last])
    )
    return Sample(prompt, ids[:first], expected)


def _prompted(row: dict, tokenizer) -> Sample:
    expected = row.get("chosen") or (row.get("completion") if row.get("label", True) else "") or ""
    return Sample(shown(row["prompt"]), prompt_ids(row["prompt"], tokenizer), _answer(expected))


def _answer(completion: str | list[dict]) -> str:
    """Return a completion as `complete` would return it: without the names of roles."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(m.get("content") or "") for m in completion)  # text, or a list of parts
