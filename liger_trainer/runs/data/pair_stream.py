"""Preference pairs that are streamed: each row is converted and checked when it is reached."""

from __future__ import annotations

from datasets import IterableDataset

from liger_trainer.runs.data.alignment import (
    COLUMNS,
    as_messages,
    judge_pair,
    own_keys,
    prepare_examples,
    split_prompt,
)
from liger_trainer.runs.data.arguments import DataArguments, Source
from liger_trainer.runs.data.conversation import TEMPLATE_COLUMNS
from liger_trainer.runs.data.forms import Form
from liger_trainer.runs.data.rows import RowError, Sieve, check_text, encoded_stream
from liger_trainer.runs.data.sources import first_rows

_FIRST = 100  # rows that are checked before training, and tell whether all are text or messages


def stream_pairs(
    rows: IterableDataset,
    source: Source,
    columns: list[str],
    data: DataArguments,
    tokenizer,
    form: Form,
    sieve: Sieve,
) -> IterableDataset:
    """Return `prompt`, `chosen` and `rejected` of rows that are read while training, with the
    columns for the chat template.

    The first rows of the source are checked as `prepare_examples` does. A later row that cannot be
    trained on raises ValueError when it is reached, or is left out.
    """
    head = first_rows(source, _FIRST, streaming=True)
    first = Sieve(f"first {sieve.split}", sieve.dataset, sieve.invalid)
    options = {"needed": (), "check": None, "seed": 0}  # none of which pairs have
    known = prepare_examples(head, data, tokenizer, form, first, **options)
    is_text = isinstance(known[0]["chosen"], str)
    kept = [*COLUMNS["pairs"], *(n for n in TEMPLATE_COLUMNS if n in columns)]

    def fitted(row: dict) -> dict:
        try:
            return {**_pair(row, form, tokenizer, data.max_length, is_text, kept), "flaw": ""}
        except RowError as error:
            return {**dict.fromkeys(kept), "flaw": str(error)}

    return encoded_stream(rows, columns, fitted, sieve).remove_columns("flaw")


def _pair(
    row: dict, form: Form, tokenizer, max_length: int, is_text: bool, kept: list[str]
) -> dict:
    """Return the columns `kept` of one row. Raises RowError for one that cannot be used."""
    row = form.apply(row)
    names = [name for name in COLUMNS["pairs"] if name in row]
    for name in names:
        check_text(name, row[name])
    prompt, chosen = row.get("prompt"), row["chosen"]
    if isinstance(chosen, list) and (prompt is None or (isinstance(prompt, str) and chosen[1:])):
        row = {**row, **split_prompt(row)}
    texts = [name for name in COLUMNS["pairs"] if isinstance(row.get(name), str)]
    if len(texts) not in (0, len(COLUMNS["pairs"])):
        row = {**row, **as_messages(row, texts)}
    if isinstance(row["chosen"], str) != is_text:
        kinds = ("text", "messages") if is_text else ("messages", "text")
        raise RowError(f"`chosen` is {kinds[1]}, in other rows {kinds[0]}")
    judge_pair(row, tokenizer, max_length)
    options = [name for name in TEMPLATE_COLUMNS if name in kept]
    decoded = [n for n in options if n != "tools" or not isinstance(row.get(n), str)]  # or JSON
    return {name: row.get(name) for name in kept} | own_keys(row, decoded)
