"""Examples of the preference and reward methods: found by their columns, brought to one form,
checked. Their trainers tokenize them.

| kind | columns | methods |
|---|---|---|
| pairs | `chosen`, `rejected`, and `prompt` unless both are whole conversations | dpo, orpo, cpo |
| labelled | `prompt`, `completion`, and `label`, true or false; pairs become two each | kto |
| prompts | `prompt`, and what the reward functions ask for | grpo |

Texts are strings or lists of chat messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from datasets import Dataset, Value, concatenate_datasets

from liger_trainer.runs.data.rows import ROW, columns, text_flaw, without_flawed
from liger_trainer.runs.data.tokenize import IGNORE_INDEX, RowError, encoder

COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
}
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # which TRL gives to the chat template


def prepare_examples(
    dataset: Dataset,
    tokenizer,
    *,
    kind: str,
    what: str,
    notes: list[str],
    max_length: int,
    invalid: str = "raise",
    needed: Iterable[str] = (),
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset:
    """The examples (`numbered`) with the columns of `kind`, all fit to train on.

    Args:
        what: "training" or "held-out", for messages.
        notes: gets a sentence about what was left out.
        invalid: "raise" raises for an example that cannot be trained on, "drop" leaves it out.
        needed: columns that are kept and must be there, besides those of `kind`.
        seed: shuffles the two examples that each pair becomes.

    Raises ValueError for missing columns, labels that are not true or false or are all the same,
    and, with `invalid="raise"`, for an empty or an unchanged text and for a prompt that leaves its
    completion no room within `max_length`.
    """
    left = {"what": what, "invalid": invalid, "notes": notes}
    paired = {"chosen", "rejected"} <= set(columns(dataset))
    source = "pairs" if kind == "labelled" and paired else kind
    names = [n for n in COLUMNS[source] if n in columns(dataset) and n != "label"]
    dataset = _with_texts(dataset, names, left, num_proc)
    if source == "pairs":
        _require(dataset, "pairs", ("chosen", "rejected"), ())
        dataset = _with_prompt(dataset, left)
    if source != kind:
        dataset = _unpaired(dataset, seed)
    _require(dataset, kind, COLUMNS[kind], needed)
    dataset = _unmixed(dataset, [name for name in COLUMNS[kind] if name != "label"])
    if kind == "labelled":
        _check_labels(dataset, what)
    if kind != "prompts":
        flaw_of = {"pairs": _pair_flaw, "labelled": _label_flaw}[kind]
        flaws = _flaws(dataset, lambda row: flaw_of(row, tokenizer, max_length), num_proc)
        dataset = without_flawed(dataset, flaws, **left)
    elif tokenizer.chat_template is None and not _is_text(dataset, "prompt"):
        raise ValueError(
            "data: the prompts are chat messages, but the tokenizer has no chat template. Use the "
            "instruction-tuned model, set model.chat_template to a Jinja file, or use strings"
        )
    if kind == "labelled" and what == "training":
        _check_both_labels(dataset)
    if kind == "prompts":
        return dataset.remove_columns(ROW)  # rewards take any other column
    keep = [*COLUMNS[kind], *_TEMPLATE_COLUMNS]
    return dataset.select_columns([name for name in keep if name in dataset.column_names])


def _flaws(dataset: Dataset, flaw_of: Callable[[dict], str], num_proc: int | None) -> list[str]:
    """What `flaw_of` says of each row; empty for those that are fit."""

    def flaw(example: dict) -> dict:
        try:
            return {"flaw": flaw_of(example)}
        except RowError as error:
            return {"flaw": str(error)}

    found = dataset.map(
        flaw, remove_columns=dataset.column_names, num_proc=num_proc, desc="Checking examples"
    )
    return found["flaw"][:]


def _with_texts(dataset: Dataset, names: list[str], left: dict, num_proc: int | None) -> Dataset:
    """The rows in which the columns `names` hold text or messages, the same in every row."""
    first = {n: next((v for v in dataset[n] if v is not None), None) for n in names}

    def flaw(example: dict) -> str:
        for name in names:
            if found := text_flaw(name, example[name]):
                return found
            if type(example[name]) is not type(first[name]):
                return f"`{name}` is {_kind(example[name])}, in other rows {_kind(first[name])}"
        return ""

    return without_flawed(dataset, _flaws(dataset, flaw, num_proc), **left)


def _kind(text: str | list) -> str:
    return "text" if isinstance(text, str) else "messages"


def _with_prompt(dataset: Dataset, left: dict) -> Dataset:
    """Pairs of whole conversations, with the beginning that they share as their prompt.

    A prompt that is a string beside such conversations repeats what they begin with.
    """
    has_prompt = "prompt" in columns(dataset)
    if _is_text(dataset, "chosen") or (has_prompt and not _is_text(dataset, "prompt")):
        return dataset
    if has_prompt and all(len(chosen) <= 1 for chosen in dataset["chosen"]):
        return dataset  # answers alone

    def flaw(example: dict) -> str:
        chosen, rejected = (_plain(example[name]) for name in ("chosen", "rejected"))
        if chosen[:-1] == rejected[:-1]:
            return ""
        return (
            "`chosen` and `rejected` are conversations that differ before their last message; "
            "give what they share as a column `prompt`"
        )

    def split(example: dict) -> dict:
        chosen, rejected = (_plain(example[name]) for name in ("chosen", "rejected"))
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}

    dataset = without_flawed(dataset, _flaws(dataset, flaw, None), **left)
    split_up = [name for name in COLUMNS["pairs"] if name in dataset.column_names]
    return dataset.map(split, remove_columns=split_up, desc="Finding prompts")


def _unmixed(dataset: Dataset, names: list[str]) -> Dataset:
    """Strings beside chat messages become messages, of the user or of the assistant."""
    texts = [name for name in names if _is_text(dataset, name)]
    if len(texts) in (0, len(names)):
        return dataset

    def to_messages(example: dict) -> dict:
        roles = {name: "user" if name == "prompt" else "assistant" for name in texts}
        return {name: [{"role": roles[name], "content": example[name]}] for name in texts}

    return dataset.map(to_messages, remove_columns=texts, desc="Strings to messages")


def _unpaired(pairs: Dataset, seed: int) -> Dataset:
    """Each pair as a liked and a disliked completion, shuffled."""
    sides = []
    for name, other, label in (("chosen", "rejected", True), ("rejected", "chosen", False)):
        side = pairs.remove_columns(other).rename_column(name, "completion")
        sides.append(side.add_column("label", [label] * len(pairs)))
    return concatenate_datasets(sides).shuffle(seed=seed)


def _require(dataset: Dataset, kind: str, names: Iterable[str], needed: Iterable[str]) -> None:
    present = columns(dataset)
    for name in names:
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            theirs = close[0] if close else "..."
            raise ValueError(
                f"data: no column {name!r} among {', '.join(present)}; {kind} need "
                f"{', '.join(names)}. Name yours with data.columns, for example "
                f"`columns: {{{name}: {theirs}}}`"
            )
    for name in needed:
        if name not in present:
            raise ValueError(
                f"data: no column {name!r} among {', '.join(present)}; a function of "
                "reward.functions asks for it"
            )


def _is_text(dataset: Dataset, name: str) -> bool:
    """Whether a column holds strings, not messages; ValueError where it holds neither."""
    feature = dataset.features[name]
    if isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "null"):
        raise ValueError(
            f"data: the column {name!r} is of type {feature.dtype}; it must hold text or messages"
        )
    return isinstance(feature, Value)


def _check_labels(dataset: Dataset, what: str) -> None:
    feature = dataset.features["label"]
    if not isinstance(feature, Value) or feature.dtype != "bool":
        kind = getattr(feature, "dtype", feature)
        raise ValueError(
            f"data: the column `label` of the {what} examples is of type {kind}; it must be true "
            "(a completion to learn) or false (one to unlearn)"
        )


def _check_both_labels(dataset: Dataset) -> None:
    labels = set(dataset["label"])
    if len(labels) == 1:
        only = str(labels.pop()).lower()
        raise ValueError(
            f"data: the label of all {len(dataset)} training examples is {only}; kto learns from "
            "completions of both kinds"
        )


def _pair_flaw(example: dict, tokenizer, max_length: int) -> str:
    """Why a pair cannot be trained on; empty if it can."""
    texts = {name: example[name] for name in COLUMNS["pairs"]}
    if not texts["prompt"]:
        return "`prompt` is empty"
    if _plain(texts["chosen"]) == _plain(texts["rejected"]):
        return "`chosen` and `rejected` are equal"
    ids = []
    for name in ("chosen", "rejected"):
        encoded = _encode(texts["prompt"], texts[name], tokenizer, max_length)
        if all(label == IGNORE_INDEX for label in encoded["labels"]):
            return _no_room(max_length)
        ids.append(encoded["input_ids"])
    if ids[0] == ids[1]:
        return (
            f"`chosen` and `rejected` differ only after data.max_length ({max_length} tokens); "
            "raise it"
        )
    return ""


def _label_flaw(example: dict, tokenizer, max_length: int) -> str:
    if example["label"] is None:
        return "`label` is missing"
    encoded = _encode(example["prompt"], example["completion"], tokenizer, max_length)
    labelled = any(label != IGNORE_INDEX for label in encoded["labels"])
    return "" if labelled else _no_room(max_length)


def _encode(prompt, completion, tokenizer, max_length: int) -> dict:
    encode = encoder(
        tokenizer, kind="prompt_completion", max_length=max_length, assistant_only=True
    )
    return encode({"prompt": prompt, "completion": completion})


def _no_room(max_length: int) -> str:
    return (
        f"its prompt alone fills data.max_length ({max_length} tokens); raise it, or shorten the "
        "prompt"
    )


def _plain(text):
    """Messages without the keys that are absent in them but present in others."""
    if isinstance(text, str):
        return text
    return [{k: v for k, v in message.items() if v is not None} for message in text]
