"""Examples with images: recognized by their column, checked, and collated by TRL.

A row has `images`, a list, or `image`, a single one. Each is an image of `datasets`, or the path of
a file relative to the working folder or to that of the data. Images are placed where the messages
have `{"type": "image"}`, or before the user's first text.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from liger_trainer.runs.data.arguments import Source
from liger_trainer.runs.data.conversation import REASONING, pruned
from liger_trainer.runs.data.forms import Form
from liger_trainer.runs.data.rows import RowError, Sieve, checked
from liger_trainer.runs.data.sources import files_of
from liger_trainer.runs.data.task import Task
from liger_trainer.runs.data.text import check_form
from liger_trainer.runs.data.tokenize import IGNORE_INDEX

IMAGES = ("images", "image")  # columns that may hold images
_PARTS = [
    {"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}
]
_STORED = {"bytes": Value("binary"), "path": Value("string")}


@dataclass(frozen=True)
class VisionCollator:
    """Collate rows with images to tensors, with TRL's collators.

    Text rows get labels, only for the completion if there is one. For pairs, the chosen sequences
    precede the rejected ones.
    """

    processor: Any
    pairs: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
            from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
        except ImportError as error:
            raise ValueError(
                f"data: examples with images need TRL, which cannot be imported ({error}): "
                "`pip install trl`"
            ) from error
        examples = [pruned(example) for example in examples]
        if self.pairs:
            return DataCollatorForVisionPreference(self.processor)(examples)
        collate = DataCollatorForVisionLanguageModeling(
            self.processor, completion_only_loss="completion" in examples[0]
        )
        return collate(examples)


def has_images(names: list[str]) -> bool:
    """Return whether rows with these columns have images."""
    return bool(set(IMAGES) & set(names))


def with_images(
    rows: Dataset, source: Source, sieve: Sieve, num_proc: int | None = None
) -> Dataset:
    """Return the rows with a list of images in the column `images`, which may be empty.

    Raises ValueError for a column of another type and, unless `sieve` drops them, for rows with an
    image that cannot be read.
    """
    name = next((name for name in IMAGES if name in rows.column_names), None)
    folders = [Path(), *{path.parent for path in files_of(source)}]
    if name is not None:
        rows = _undecoded(rows, name)

    def listed(row: dict) -> dict:
        value = row[name] if name else None
        several = value if isinstance(value, list) else [] if value is None else [value]
        return {"images": [_stored(item, folders) for item in several]}

    def check_row(row: dict) -> None:
        for number, stored in enumerate(row["images"], 1):
            _check_readable(stored, number)

    others = {n: feature for n, feature in rows.features.items() if n not in IMAGES}
    rows = rows.map(
        listed,
        remove_columns=[n for n in IMAGES if n in rows.column_names],
        features=Features({**others, "images": [_STORED]}),
        desc="Finding images",
    )
    return checked(rows, check_row, sieve, num_proc).cast_column("images", [Image()])


def prepare_images(rows: Dataset, processor, task: Task) -> Dataset:
    """Return `prompt`, `completion` and `images` of the rows that can be trained on.

    If all tokens are trained on, return `messages` and `images` instead. Rows are not truncated: a
    row that is longer than `data.max_length` cannot be used. Raises ValueError for rows that are
    neither messages nor prompt and completion.
    """
    form, data = task.form, task.data
    if form.kind not in ("messages", "prompt_completion"):
        raise ValueError(
            f"data: {form.name} rows cannot have images; give messages, or prompt and completion"
        )

    def convert(row: dict) -> dict:
        return _structured(row, form, assistant_only=data.assistant_only)

    check = length_check(VisionCollator(processor), data.max_length)

    def check_row(row: dict) -> None:
        check({**convert(row), "images": row["images"]})

    rows = checked(rows, check_row, task.sieve, data.num_proc)
    names = ("prompt", "completion") if data.assistant_only else ("messages",)
    return rows.map(
        convert,
        remove_columns=[name for name in rows.column_names if name != "images"],
        features=Features({**dict.fromkeys(names, _PARTS), "images": rows.features["images"]}),
        desc="Placing images",
    )


def length_check(collator: VisionCollator, max_length: int) -> Callable[[dict], None]:
    """Return a function that raises RowError for a row that does not fit the model."""

    def check(row: dict) -> None:
        try:
            batch = collator([row])
        except (ValueError, TypeError, IndexError) as error:
            raise RowError(f"the processor refuses it: {' '.join(str(error).split())}") from error
        length = batch["input_ids"].shape[1]
        if length > max_length:
            raise RowError(
                f"it has {length} tokens with its images, more than data.max_length "
                f"({max_length}), and images cannot be cut; raise it"
            )
        labels = batch.get("labels")
        if labels is not None and not (labels != IGNORE_INDEX).any():
            raise RowError("nothing is trained on")

    return check


def placed(messages: list[dict], count: int) -> list[dict]:
    """Return messages whose content is a list of parts, with a placeholder for each image.

    Raises RowError if the messages have placeholders, but not `count` of them.
    """
    for name in ("tool_calls", *REASONING):
        if any(message.get(name) for message in messages):
            raise RowError(f"it has `{name}`, which does not reach the chat template beside images")
    parts = [{"role": m["role"], "content": _parts(m.get("content"))} for m in pruned(messages)]
    places = sum(part["type"] == "image" for m in parts for part in m["content"])
    asker = next((m for m in parts if m["role"] == "user"), None)
    if places == 0 and count and asker is not None:
        asker["content"][:0] = [{"type": "image"}] * count
        places = count
    if places != count:
        raise RowError(f"it has {count} images, but {places} places for them in its messages")
    return parts


def _structured(row: dict, form: Form, *, assistant_only: bool) -> dict[str, Any]:
    if row.get("tools"):
        raise RowError("it has tools, which do not reach the chat template beside images")
    example = form.apply(row)
    check_form(form.kind, example)
    count = len(row["images"])
    if form.kind == "messages":
        prompt, completion = _split(example["messages"], strict=assistant_only)
    else:
        prompt = _messages(example["prompt"], "user")
        completion = _messages(example["completion"], "assistant")
    if not assistant_only:
        return {"messages": placed(prompt + completion, count)}
    return {"prompt": placed(prompt, count), "completion": placed(completion, 0)}


def _split(messages: list[dict], *, strict: bool) -> tuple[list[dict], list[dict]]:
    """Return the messages before the last answer, and the last answer."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if strict and answers != [len(messages) - 1]:
        raise RowError(
            f"it has {len(answers)} turns of the assistant; with images, only one at the end can "
            "be trained on. Give `prompt` and `completion`, or set data.assistant_only to false"
        )
    return messages[:-1], messages[-1:]


def _messages(text: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _parts(content: str | list | None) -> list[dict]:
    if not isinstance(content, list):
        return [{"type": "text", "text": content}] if content else []
    for part in content:
        if part.get("type") not in ("text", "image") or len(part.keys() - {"type", "text"}):
            raise RowError(
                f"a part of a message is {part!r}; it must be text, or the place of an image from "
                "the column `images`"
            )
    return list(content)


def _undecoded(rows: Dataset, name: str) -> Dataset:
    """Return the rows with undecoded images; paths stay.

    Raises ValueError for a column that holds neither.
    """
    feature = rows.features[name]
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(inner, Image):
        stored = Image(decode=False)
        return rows.cast_column(name, stored if inner is feature else [stored])
    if isinstance(inner, dict) or getattr(inner, "dtype", "") in ("string", "large_string", "null"):
        return rows
    raise ValueError(f"data: the column {name!r} is {feature}; it must hold images or their paths")


def _stored(item: Any, folders: list[Path]) -> dict[str, Any]:
    if isinstance(item, str):
        found = next((f / item for f in folders if (f / item).is_file()), Path(item))
        return {"bytes": None, "path": str(found)}
    return {key: item.get(key) for key in _STORED}


def _check_readable(stored: dict[str, Any], number: int) -> None:
    import PIL.Image

    content, path = stored["bytes"], stored["path"]
    try:
        with PIL.Image.open(io.BytesIO(content) if content is not None else path) as image:
            image.verify()
    except (OSError, SyntaxError, AttributeError) as error:  # PIL's, for a broken PNG and for None
        raise RowError(f"image {number} cannot be read: {error}") from error
