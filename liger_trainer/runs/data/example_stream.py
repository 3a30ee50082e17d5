"""Examples of the preference and reward methods that are streamed: each row is converted and
checked when it is reached."""

from __future__ import annotations

from dataclasses import replace

from datasets import IterableDataset

from liger_trainer.runs.data.alignment import (
    COLUMNS,
    as_messages,
    own_keys,
    prepare_examples,
    row_check,
    split_prompt,
)
from liger_trainer.runs.data.conversation import TEMPLATE_COLUMNS
from liger_trainer.runs.data.forms import Form
from liger_trainer.runs.data.rows import RowError, Sieve, check_text, encoded_stream
from liger_trainer.runs.data.sources import first_rows
from liger_trainer.runs.data.splits import Part
from liger_trainer.runs.data.task import Task

_FIRST = 100  # rows that are checked before training, and tell whether all are text or messages


def stream_examples(part: Part, task: Task) -> IterableDataset:
    """Return the examples of rows that are read while training, as `prepare_examples` does.

    The first rows of the source are checked before training. A later row that cannot be trained on
    raises ValueError when it is reached, or is left out.
    """
    form, sieve = task.form, task.sieve
    if form.kind == "labeled" and {"chosen", "rejected"} <= set(part.columns):
        raise ValueError(
            "data.streaming: pairs cannot stream for kto, which learns from each answer by itself; "
            "give every answer a row with `prompt`, `completion` and `label`, or remove the key"
        )
    head = first_rows(part.source, _FIRST, streaming=True)
    first = Sieve(f"first {sieve.split}", sieve.dataset, sieve.invalid)
    known = prepare_examples(head, replace(task, sieve=first))
    kept, is_text = known.column_names, isinstance(known[0]["prompt"], str)
    check_row = row_check(task)

    def fitted(row: dict) -> dict:
        try:
            example = _example(row, form, is_text)
            check_row(example)
        except RowError as error:
            return {**dict.fromkeys(kept), "flaw": str(error)}
        found = {name: example.get(name) for name in kept}
        return {**found, **_template_arguments(example, form.kind, kept), "flaw": ""}

    return encoded_stream(part.rows, part.columns, fitted, sieve).remove_columns("flaw")


def _example(row: dict, form: Form, is_text: bool) -> dict:
    """Return a row with the columns of its kind. Raises RowError for one that cannot be used."""
    row = form.apply(row)
    names = [name for name in COLUMNS[form.kind] if name != "label"]
    for name in names if form.kind != "pairs" else [n for n in names if n in row]:
        check_text(name, row.get(name))
    if form.kind == "labeled" and not isinstance(row.get("label"), bool):
        raise RowError(f"`label` is {row.get('label')!r}, neither true nor false")
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(chosen, list) and (prompt is None or (isinstance(prompt, str) and chosen[1:])):
        row = {**row, **split_prompt(row)}
    texts = [name for name in names if isinstance(row.get(name), str)]
    if len(texts) not in (0, len(names)):
        row = {**row, **as_messages(row, texts)}
    if isinstance(row["prompt"], str) != is_text:
        kinds = ("text", "messages") if is_text else ("messages", "text")
        raise RowError(f"`prompt` is {kinds[1]}, in other rows {kinds[0]}")
    return row


def _template_arguments(example: dict, kind: str, kept: list[str]) -> dict:
    """Return the row's own arguments of the chat template; `tools` in JSON stay as they are."""
    if kind == "prompts":
        return {}
    in_json = {"tools"} if isinstance(example.get("tools"), str) else set()
    return own_keys(example, {*TEMPLATE_COLUMNS} & {*kept} - in_json)
