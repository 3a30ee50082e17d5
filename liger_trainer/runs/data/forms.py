"""Forms of a row: the columns that identify them, and their conversion to one that is trained on.

| form | columns | becomes |
|---|---|---|
| ShareGPT | `conversations` of `{from, value}`; optionally `system` | messages |
| Alpaca | `instruction`, `output`; optionally `input`, `system`, `history` | prompt, completion |

If there are also columns of preferences, either form gives only the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liger_trainer.runs.data.rows import RowError

Messages = list[dict[str, Any]]
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SHAREGPT, _ALPACA = ("system",), ("input", "system", "history")


@dataclass(frozen=True)
class Form:
    """One form that rows can have."""

    name: str  # as in `data.form`
    kind: str  # the kind of examples that it becomes: "messages", "pairs" and so on
    columns: tuple[str, ...]  # the columns that identify it
    optional: tuple[str, ...] = ()  # columns that are used if they exist
    convert: Callable[[dict], dict] | None = None  # new columns of a row; None: unchanged

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that `convert` replaces."""
        return (*self.columns, *self.optional) if self.convert else ()

    def apply(self, row: dict) -> dict:
        """Return a row with its converted columns; raise RowError if it cannot be converted."""
        return {**row, **self.convert(row)} if self.convert else row


def messages_of(turns: Any, column: str, system: str | None = None) -> Messages:
    """Return turns of `{from, value}` as messages; turns that are messages stay unchanged.

    Raise RowError for an unknown speaker, and if `turns` is not a list of turns.
    """
    if not isinstance(turns, list):
        raise RowError(f"`{column}` is {turns!r}, not a list of turns")
    start = [{"role": "system", "content": system}] if system else []
    return start + [_message(turn, column, i) for i, turn in enumerate(turns, 1)]


def _message(turn: Any, column: str, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} of `{column}` is {turn!r}, not `from` and `value`")
    if turn.get("from") is None and turn.get("role") is not None:
        return turn
    speaker, value = turn.get("from"), turn.get("value")
    role = _ROLES.get(str(speaker).lower())
    if role is None:
        raise RowError(
            f"turn {number} of `{column}` is from {speaker!r}, none of {', '.join(_ROLES)}"
        )
    if not isinstance(value, str):
        raise RowError(f"turn {number} of `{column}` has the value {value!r}, no text")
    rest = {key: v for key, v in turn.items() if key not in ("from", "value")}
    if str(speaker).lower() == "function_call":
        return {**rest, "role": role, "content": "", "tool_calls": _calls(value, column, number)}
    return {**rest, "role": role, "content": value}


def _calls(value: str, column: str, number: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise RowError(f"turn {number} of `{column}` is not a call in JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _alpaca_messages(row: dict) -> Messages:
    """Return the messages of the columns `system`, `history`, `instruction` and `input`."""
    instruction, details = row["instruction"], row.get("input")
    for name, value in (("instruction", instruction), ("input", details or "")):
        if not isinstance(value, str):
            raise RowError(f"`{name}` is {value!r}, no text")
    if not instruction.strip():
        raise RowError("`instruction` is empty")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or ():
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"`history` holds {turn!r}, not a pair of question and answer")
        messages += [_chat("user", turn[0]), _chat("assistant", turn[1])]
    text = f"{instruction}\n\n{details}" if details else instruction
    return [*messages, _chat("user", text)]


def _chat(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _answer(row: dict, column: str) -> Messages:
    value = row[column]
    if value is None:
        raise RowError(f"`{column}` is missing")
    if not isinstance(value, str):
        raise RowError(f"`{column}` is {value!r}, no text")
    if not value.strip():
        raise RowError(f"`{column}` is empty")
    return [_chat("assistant", value)]


def _sharegpt(row: dict) -> dict:
    return {"messages": messages_of(row["conversations"], "conversations", row.get("system"))}


def _alpaca(row: dict) -> dict:
    return {"prompt": _alpaca_messages(row), "completion": _answer(row, "output")}


def _alpaca_labeled(row: dict) -> dict:
    return {**_alpaca(row), "label": row["label"]}


def _sharegpt_pairs(row: dict) -> dict:
    prompt = messages_of(row["conversations"], "conversations", row.get("system"))
    return {"prompt": prompt, **{name: _side(row[name], name) for name in ("chosen", "rejected")}}


def _side(value: Any, name: str) -> Messages:
    if isinstance(value, str):
        return [_chat("assistant", value)]
    return messages_of([value] if isinstance(value, dict) else value, name)


def _alpaca_pairs(row: dict) -> dict:
    return {"prompt": _alpaca_messages(row), **{n: _answer(row, n) for n in ("chosen", "rejected")}}


def _alpaca_prompts(row: dict) -> dict:
    return {"prompt": _alpaca_messages(row)}


# Forms of text examples; then forms that the examples of other methods can have besides their own.
TEXT_FORMS = (
    Form("messages", "messages", ("messages",)),
    Form("prompt_completion", "prompt_completion", ("prompt", "completion")),
    Form("text", "text", ("text",)),
    Form("tokenized", "tokenized", ("input_ids",)),
    Form("sharegpt", "messages", ("conversations",), _SHAREGPT, _sharegpt),
    Form("alpaca", "prompt_completion", ("instruction", "output"), _ALPACA, _alpaca),
)
OTHER_FORMS = (
    Form("sharegpt", "pairs", ("conversations", "chosen", "rejected"), _SHAREGPT, _sharegpt_pairs),
    Form("alpaca", "pairs", ("instruction", "chosen", "rejected"), _ALPACA, _alpaca_pairs),
    Form("alpaca", "labeled", ("instruction", "output", "label"), _ALPACA, _alpaca_labeled),
    Form("alpaca", "prompts", ("instruction",), _ALPACA, _alpaca_prompts),
)
NAMES = tuple(form.name for form in TEXT_FORMS)


def form_of(names: list[str], examples: str, chosen: str | None = None) -> Form:
    """Return the form of rows with the columns `names`.

    Args:
        examples: the kind of examples that the method trains on, `Method.examples`.
        chosen: `data.form`; None recognizes the form by the columns.

    Raises ValueError if no form or more than one fits, or if the chosen one does not.
    """
    text = examples == "text"
    forms = TEXT_FORMS if text else [form for form in OTHER_FORMS if form.kind == examples]
    fits = [form for form in forms if set(form.columns) <= set(names)]
    if chosen is not None:
        found = [form for form in forms if form.name == chosen]
        if not found:
            usable = ", ".join(form.name for form in forms) or "none, so remove the key"
            raise ValueError(f"data.form: {chosen} cannot become {examples}; use one of {usable}")
        if found[0] not in fits:
            raise ValueError(
                f"data.form: {chosen} needs the columns {', '.join(found[0].columns)}; the "
                f"dataset has {', '.join(names)}"
            )
        return found[0]
    own = Form(examples, examples, ())
    if not text and ("prompt" in names or not fits):
        return own  # missing columns are reported where they are needed
    if len(fits) > 1:
        several = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in fits)
        raise ValueError(
            f"data: the columns {', '.join(names)} fit more than one form: {several}. Choose one "
            f"with data.form, for example `form: {fits[0].name}`"
        )
    if not fits:
        raise ValueError(
            f"data: the dataset has the columns {', '.join(names)}; training needs `messages`, "
            "or `prompt` and `completion`, or `text`, or `conversations` (ShareGPT), or "
            "`instruction` and `output` (Alpaca), or `input_ids`. Name yours with data.columns, "
            "for example `columns: {prompt: question, completion: answer}`"
        )
    return fits[0]
