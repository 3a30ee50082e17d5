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

from liger_trainer.runs.tokenize import IGNORE_INDEX, encoder

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
    invalid: str = "error",
    needed: Iterable[str] = (),
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset:
    """The examples with the columns of `kind`, all fit to train on.

    Args:
        what: "training" or "held-out", for messages.
        notes: gets a sentence about what was left out.
        invalid: "error" raises for an example that cannot be trained on, "drop" leaves it out.
        needed: columns that are kept and must be there, besides those of `kind`.
        seed: shuffles the two examples that each pair becomes.

    Raises ValueError for missing columns, labels that are not true or false or are all the same,
    and, with `invalid="error"`, for an empty or an unchanged text and for a prompt that leaves its
    completion no room within `max_length`.
    """
    paired = {"chosen", "rejected"} <= set(dataset.column_names)
    if kind == "pairs" or (kind == "labelled" and paired):
        dataset = _with_prompt(dataset)
    if kind == "labelled" and paired:
        dataset = _unpaired(dataset, seed)
    _require(dataset, kind, COLUMNS[kind], needed)
    dataset = _unmixed(dataset, [name for name in COLUMNS[kind] if name != "label"])
    if kind == "labelled":
        _check_labels(dataset, what)
    flaws = dataset.map(
        lambda example: {"flaw": _FLAWS[kind](example, tokenizer, max_length)},
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Checking {what} examples",
    )["flaw"][:]
    found = [i for i, flaw in enumerate(flaws) if flaw]
    if found:
        _report(found, flaws, what, invalid, notes)
        dataset = dataset.select([i for i, flaw in enumerate(flaws) if not flaw])
    if kind == "labelled" and what == "training":
        _check_both_labels(dataset)
    if kind == "prompts":
        return dataset  # rewards take any column
    keep = [*COLUMNS[kind], *_TEMPLATE_COLUMNS]
    return dataset.select_columns([name for name in keep if name in dataset.column_names])


def _with_prompt(dataset: Dataset) -> Dataset:
    """Pairs of whole conversations, with the beginning that they share as their prompt.

    A prompt that is a string beside such conversations repeats what they begin with.
    """
    _require(dataset, "pairs", ("chosen", "rejected"), ())
    has_prompt = "prompt" in dataset.column_names
    if _is_text(dataset, "chosen") or (has_prompt and not _is_text(dataset, "prompt")):
        return dataset
    if has_prompt and all(len(chosen or ()) <= 1 for chosen in dataset["chosen"]):
        return dataset  # answers alone

    def split(example: dict) -> dict:
        chosen, rejected = (_plain(example[name] or []) for name in ("chosen", "rejected"))
        if not chosen or not rejected:
            return {"prompt": [], "chosen": chosen, "rejected": rejected}  # named as empty later
        if chosen[:-1] != rejected[:-1]:
            raise ValueError(
                "data: `chosen` and `rejected` are conversations that differ before their last "
                "message; give what they share as a column `prompt`"
            )
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}

    columns = [name for name in COLUMNS["pairs"] if name in dataset.column_names]
    return dataset.map(split, remove_columns=columns, desc="Finding prompts")


def _unmixed(dataset: Dataset, columns: list[str]) -> Dataset:
    """Strings beside chat messages become messages, of the user or of the assistant."""
    texts = [name for name in columns if _is_text(dataset, name)]
    if len(texts) in (0, len(columns)):
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


def _require(dataset: Dataset, kind: str, columns: Iterable[str], needed: Iterable[str]) -> None:
    present = dataset.column_names
    for name in columns:
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            theirs = close[0] if close else "..."
            raise ValueError(
                f"data: no column {name!r} among {', '.join(present)}; {kind} need "
                f"{', '.join(columns)}. Name yours with data.columns, for example "
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


def _report(found: list[int], flaws: list[str], what: str, invalid: str, notes: list[str]) -> None:
    first = found[0]
    message = f"{len(found)} of {len(flaws)} {what} examples, the first because {flaws[first]}"
    if invalid == "error":
        raise ValueError(
            f"data: cannot train on {message} (row {first} after shuffling). Repair the data, or "
            "leave such examples out with data.invalid: drop"
        )
    if len(found) == len(flaws):
        raise ValueError(f"data: nothing is left: cannot train on {message}")
    notes.append(f"left out {message}")


def _pair_flaw(example: dict, tokenizer, max_length: int) -> str:
    """Why a pair cannot be trained on; empty if it can."""
    texts = {name: example[name] for name in COLUMNS["pairs"]}
    for name, text in texts.items():
        if _is_empty(text):
            return f"`{name}` is empty"
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
    for name in ("prompt", "completion"):
        if _is_empty(example[name]):
            return f"`{name}` is empty"
    if example["label"] is None:
        return "`label` is missing"
    encoded = _encode(example["prompt"], example["completion"], tokenizer, max_length)
    labelled = any(label != IGNORE_INDEX for label in encoded["labels"])
    return "" if labelled else _no_room(max_length)


def _prompt_flaw(example: dict, tokenizer, max_length: int) -> str:
    if not isinstance(example["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            "data: the prompts are chat messages, but the tokenizer has no chat template. Use the "
            "instruction-tuned model, set model.chat_template to a Jinja file, or use strings"
        )
    return "`prompt` is empty" if _is_empty(example["prompt"]) else ""


_FLAWS: dict[str, Callable[[dict, object, int], str]] = {
    "pairs": _pair_flaw,
    "labelled": _label_flaw,
    "prompts": _prompt_flaw,
}


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


def _is_empty(text) -> bool:
    """No text: nothing but space, or messages without any."""
    if isinstance(text, str):
        return not text.strip()
    return not text or not any(
        message.get("content") or message.get("tool_calls") for message in text
    )


def _plain(text):
    """Messages without the keys that are absent in them but present in others."""
    if isinstance(text, str):
        return text
    return [{k: v for k, v in message.items() if v is not None} for message in text]
