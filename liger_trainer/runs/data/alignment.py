"""Examples of the preference and reward methods: recognized by their columns, converted to one
form, and checked. Their trainers tokenize them.

| kind | columns | methods |
|---|---|---|
| pairs | `chosen`, `rejected`, and `prompt` unless both are whole conversations | dpo, orpo, cpo |
| labeled | `prompt`, `completion`, and `label`, true or false; pairs become two each | kto |
| prompts | `prompt`, and the columns that the reward functions require | grpo |

Texts are strings or lists of chat messages. Other forms are in `forms`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from datasets import Dataset, Json, Value, concatenate_datasets

from liger_trainer.runs.data.conversation import TEMPLATE_COLUMNS, Conversation, pruned
from liger_trainer.runs.data.rows import (
    ROW,
    RowCheck,
    RowError,
    Sieve,
    check_text,
    checked,
    columns,
    converted,
)
from liger_trainer.runs.data.task import Task
from liger_trainer.runs.data.tokenize import IGNORE_INDEX, encoder

COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "labeled": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
}


def prepare_examples(dataset: Dataset, task: Task) -> Dataset:
    """Return the examples that can be trained on, of rows that are `numbered`.

    They have the columns of the form's kind, and prompts also those that the purpose needs.

    Raises ValueError for missing columns, labels that are not true or false, and, unless the sieve
    drops such rows, for an empty text, equal completions, and a prompt that leaves its completion
    no room within `data.max_length`.
    """
    form, sieve, num_proc = task.form, task.sieve, task.data.num_proc
    kind = form.kind
    if form.convert is not None:
        desc = f"From {form.name}"
        dataset = converted(dataset, form.convert, sieve, num_proc, replaced=form.used, desc=desc)
    paired = {"chosen", "rejected"} <= set(columns(dataset))
    source = "pairs" if kind == "labeled" and paired else kind
    names = [n for n in COLUMNS[source] if n in columns(dataset) and n != "label"]
    dataset = _with_texts(dataset, names, sieve, num_proc)
    if source == "pairs":
        _require(dataset, "pairs", ("chosen", "rejected"), ())
        dataset = _with_prompt(dataset, sieve)
    if source != kind:
        dataset = _unpaired(dataset, task.seed)
    _require(dataset, kind, COLUMNS[kind], task.purpose.needed)
    dataset = _unmixed(dataset, [name for name in COLUMNS[kind] if name != "label"])
    if kind == "labeled":
        _check_labels(dataset, sieve.split)
    has_template = task.tokenizer.chat_template is not None
    if kind == "prompts" and not has_template and not _is_text(dataset, "prompt"):
        raise ValueError(
            "data: the prompts are chat messages, but the tokenizer has no chat template. Use the "
            "instruction-tuned model, set model.chat_template to a Jinja file, or use strings"
        )
    dataset = checked(dataset, row_check(task), sieve, num_proc)
    if kind == "prompts":
        return dataset.remove_columns(ROW)  # rewards take any other column
    keep = [*COLUMNS[kind], *TEMPLATE_COLUMNS, "images"]
    dataset = dataset.select_columns([name for name in keep if name in dataset.column_names])
    return _with_own_keys(dataset)


def _with_own_keys(dataset: Dataset) -> Dataset:
    """Return the rows with template arguments that hold only the row's own keys.

    Arrow gives every row the keys of all other rows, with None, which TRL would pass to the
    template. Also, TRL unpacks `chat_template_kwargs` of every row, even of rows without them.
    `tools` in JSON are left unchanged, because TRL decodes them, and only them.
    """
    present = [name for name in TEMPLATE_COLUMNS if name in dataset.column_names]
    in_json = [name for name in present if isinstance(dataset.features[name], Value)]
    names = [name for name in present if name != "tools" or name not in in_json]
    if not names:
        return dataset

    features = dataset.features.copy()
    features.update(dict.fromkeys(names, Json()))
    return dataset.map(
        lambda example: own_keys(example, names),
        features=features,
        desc="Arguments of the template",
    )


def own_keys(example: dict, names: Iterable[str]) -> dict:
    """Return the columns `names` of `TEMPLATE_COLUMNS` with the keys of this row alone."""
    found = Conversation.of(None, [], example)
    values = dict(zip(TEMPLATE_COLUMNS, (found.tools, found.options), strict=True))
    return {name: values[name] for name in names}


def _with_texts(dataset: Dataset, names: list[str], sieve: Sieve, num_proc: int | None) -> Dataset:
    """Return the rows whose columns `names` hold text, or messages, like the first row's."""
    first = {n: next((v for v in dataset[n] if v is not None), None) for n in names}

    def check_row(example: dict) -> None:
        for name in names:
            text = example[name]
            check_text(name, text)
            if type(text) is not type(first[name]):
                raise RowError(f"`{name}` is {_kind(text)}, in other rows {_kind(first[name])}")

    return checked(dataset, check_row, sieve, num_proc)


def _kind(text: str | list) -> str:
    return "text" if isinstance(text, str) else "messages"


def _with_prompt(dataset: Dataset, sieve: Sieve) -> Dataset:
    """Return pairs of whole conversations with their shared beginning as the prompt.

    A prompt that is a string next to such conversations repeats what they begin with.
    """
    has_prompt = "prompt" in columns(dataset)
    if _is_text(dataset, "chosen") or (has_prompt and not _is_text(dataset, "prompt")):
        return dataset
    if has_prompt and all(len(chosen) <= 1 for chosen in dataset["chosen"]):
        return dataset  # only answers

    desc = "Finding prompts"
    return converted(dataset, split_prompt, sieve, None, replaced=COLUMNS["pairs"], desc=desc)


def split_prompt(example: dict) -> dict:
    """Return a pair of whole conversations with the beginning that they share as its prompt."""
    chosen, rejected = (pruned(example[name]) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError(
            "`chosen` and `rejected` are conversations that differ before their last message; "
            "give what they share as a column `prompt`"
        )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _unmixed(dataset: Dataset, names: list[str]) -> Dataset:
    """Convert strings next to chat messages to messages of the user or of the assistant."""
    texts = [name for name in names if _is_text(dataset, name)]
    if len(texts) in (0, len(names)):
        return dataset

    return dataset.map(
        lambda example: as_messages(example, texts),
        remove_columns=texts,
        desc="Strings to messages",
    )


def as_messages(example: dict, names: Iterable[str]) -> dict:
    """Return the columns `names`, which hold text, as messages of the user or the assistant."""
    roles = {name: "user" if name == "prompt" else "assistant" for name in names}
    return {name: [{"role": roles[name], "content": example[name]}] for name in names}


def _unpaired(pairs: Dataset, seed: int) -> Dataset:
    """Return a desirable and an undesirable completion for each pair, shuffled."""
    halves = []
    for name, other, label in (("chosen", "rejected", True), ("rejected", "chosen", False)):
        half = pairs.remove_columns(other).rename_column(name, "completion")
        halves.append(half.add_column("label", [label] * len(pairs)))
    return concatenate_datasets(halves).shuffle(seed=seed)


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
    """Return whether a column holds strings, not messages; raise ValueError if it holds neither."""
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


def check_both_labels(dataset: Dataset) -> None:
    """Raise ValueError if all training examples of KTO have the same label."""
    labels = set(dataset["label"])
    if len(labels) == 1:
        only = str(labels.pop()).lower()
        raise ValueError(
            f"data: the label of all {len(dataset)} training examples is {only}; kto learns from "
            "completions of both kinds"
        )


def sides(example: dict) -> list[dict]:
    """Return the prompt with each completion of an example: the sequences that a trainer scores."""
    names = [name for name in ("chosen", "rejected", "completion") if name in example]
    kept = {name: example[name] for name in ("prompt", *TEMPLATE_COLUMNS) if name in example}
    return [{**kept, "completion": example[name]} for name in names]


def row_check(task: Task) -> RowCheck:
    """Return the function that checks a row with the columns of the form's kind."""
    tokenizer, max_length = task.tokenizer, task.data.max_length
    check_kind = {
        "pairs": lambda row: _check_pair(row, tokenizer, max_length),
        "labeled": lambda row: _check_labeled(row, tokenizer, max_length),
        "prompts": lambda row: _check_prompt(row, tokenizer),
    }[task.form.kind]
    check_purpose = task.purpose.check

    def check_row(row: dict) -> list[str]:
        unshown = check_kind(row)
        if check_purpose is not None:
            check_purpose(row)
        return unshown

    return check_row


def _check_pair(example: dict, tokenizer, max_length: int) -> list[str]:
    """Return the fields that the chat template leaves out of a pair. Raises RowError for one that
    nothing can be learned from."""
    if not example["prompt"]:
        raise RowError("`prompt` is empty")
    if pruned(example["chosen"]) == pruned(example["rejected"]):
        raise RowError("`chosen` and `rejected` are equal")
    encoded = [_supervised(side, tokenizer, max_length) for side in sides(example)]
    if encoded[0]["input_ids"] == encoded[1]["input_ids"]:
        if max(side["length"] for side in encoded) <= max_length:
            raise RowError("the chat template renders `chosen` and `rejected` alike")
        raise RowError(
            f"`chosen` and `rejected` differ only after data.max_length ({max_length} tokens); "
            "raise it"
        )
    return sorted({name for side in encoded for name in side["unshown"]})


def _check_labeled(example: dict, tokenizer, max_length: int) -> list[str]:
    if example["label"] is None:
        raise RowError("`label` is missing")
    (side,) = sides(example)
    return _supervised(side, tokenizer, max_length)["unshown"]


def _check_prompt(example: dict, tokenizer) -> list[str]:
    if isinstance(example["prompt"], str):
        return []
    conversation = Conversation.of(tokenizer, example["prompt"], {})  # without tools, as in GRPO
    return conversation.unshown(prompting=True)


def side_encoder(tokenizer, max_length: int) -> Callable[[dict], dict]:
    """Return a function that encodes one of `sides` as token ids and labels."""
    return encoder(tokenizer, kind="prompt_completion", max_length=max_length, assistant_only=True)


def _supervised(side: dict, tokenizer, max_length: int) -> dict:
    """Return one of `sides`, encoded; raise RowError if no token of its completion has a label."""
    encoded = side_encoder(tokenizer, max_length)(side)
    if any(label != IGNORE_INDEX for label in encoded["labels"]):
        return encoded
    if encoded["length"] <= max_length:
        raise RowError("no message of its completion is the assistant's")
    raise RowError(
        f"its prompt alone fills data.max_length ({max_length} tokens); raise it, or shorten the "
        "prompt"
    )
