"""Chat messages with their tools and template arguments, and how a chat template renders them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from liger_trainer.runs.data.rows import RowError

# Columns besides the messages that are passed to the chat template.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the field in templates


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that they may call, and the tokenizer whose template renders them."""

    tokenizer: Any
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further variables of the template

    @classmethod
    def of(cls, tokenizer, messages: list[dict], example: dict) -> Conversation:
        """Return the conversation of an example's messages, with its `TEMPLATE_COLUMNS`.

        Keys that hold None are removed, because Arrow gives every row the keys of all other rows.
        Raises RowError for malformed tools or template arguments.
        """
        tools, options = (_decoded(name, example.get(name)) for name in TEMPLATE_COLUMNS)
        if tools is not None and not isinstance(tools, list):
            raise RowError(f"`tools` is {tools!r}, not a list of functions")
        if options is not None and not isinstance(options, dict):
            raise RowError(f"`chat_template_kwargs` is {options!r}, not names and values")
        return cls(tokenizer, pruned(messages), pruned(tools) or None, pruned(options) or {})

    def render(self, messages: list[dict] | None = None, *, prompting: bool = False) -> str:
        """Return the text of the conversation, or of `messages` in place of its own.

        Raises RowError if the template rejects them.
        """
        try:
            return self.tokenizer.apply_chat_template(
                self.messages if messages is None else messages,
                tokenize=False,
                add_generation_prompt=prompting,
                tools=self.tools,
                **self.options,
            )
        except (TemplateError, TypeError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def unshown(self, *, prompting: bool = False) -> list[str]:
        """Return the reasoning fields that the template does not show.

        Found by rendering: a field is not shown if removing it does not change the text. Raises
        RowError if tools or tool calls are not shown, because that changes the conversation.
        """
        keys = {key for message in self.messages for key in message if message[key]}
        for name, present in (("tools", bool(self.tools)), ("tool_calls", "tool_calls" in keys)):
            if present and not self._shows(name, prompting):
                raise RowError(
                    f"the chat template does not show its `{name}`; set model.chat_template to a "
                    "template that does"
                )
        return [n for n in REASONING if n in keys and not self._shows(n, prompting)]

    def _shows(self, name: str, prompting: bool) -> bool:
        without = [{k: v for k, v in m.items() if k != name} for m in self.messages]
        without = [{"content": "", **message} for message in without]
        other = Conversation(
            self.tokenizer, without, None if name == "tools" else self.tools, self.options
        )
        try:
            return other.render(prompting=prompting) != self.render(prompting=prompting)
        except RowError:
            return True  # the template requires it


def prompt_ids(prompt: str | list[dict], tokenizer) -> list[int]:
    """Return the token ids of a text, or of messages for the assistant to answer."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = Conversation.of(tokenizer, prompt, {}).render(prompting=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def require_template(tokenizer) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "data: the examples are chat messages, but the tokenizer has no chat template. Use the "
            "instruction-tuned model, set model.chat_template to a Jinja file, or use columns "
            "`prompt` and `completion` with plain strings"
        )


def pruned(value: Any) -> Any:
    """Return `value` without the keys that hold None, at any depth."""
    if isinstance(value, dict):
        return {k: pruned(v) for k, v in value.items() if v is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def _decoded(name: str, value: Any) -> Any:
    """Return a column's value, decoded if it is JSON text, as tools with different schemas are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowError(f"`{name}` is text that is not JSON: {error}") from error
