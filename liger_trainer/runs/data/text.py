"""Text examples to token ids and labels; those that nothing can be learned from are named."""

from __future__ import annotations

from datasets import Dataset, Features, Sequence, Value

from liger_trainer.runs.data.rows import text_flaw, without_flawed
from liger_trainer.runs.data.tokenize import IGNORE_INDEX, RowError, encoder

_IDS = Sequence(Value("int64"))
_ENCODED = Features({"input_ids": _IDS, "labels": _IDS, "flaw": Value("string")})


def tokenized(data, tokenizer, kind: str, dataset: Dataset, what: str, notes: list[str]) -> Dataset:
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
