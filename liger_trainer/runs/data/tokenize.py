"""One training example to token ids and labels: chat messages, prompt and completion, or text.

Labels are `IGNORE_INDEX` wherever the model is not to be trained: prompts, other speakers' turns,
and the first token, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import TemplateError

IGNORE_INDEX = -100
COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}

_SENTINEL = "\x01"  # no template strips it and no text holds it

Piece = tuple[str, bool]  # (text, whether it is trained on)


class RowError(ValueError):
    """An example that cannot be encoded; the message says why, to follow "because"."""


def detect_format(column_names: list[str]) -> str:
    """The key of `COLUMNS` whose columns are all there. Raises ValueError when none is."""
    for name, columns in COLUMNS.items():
        if set(columns) <= set(column_names):
            return name
    raise ValueError(
        f"data: the dataset has the columns {', '.join(column_names)}; training needs `messages`, "
        "or `prompt` and `completion`, or `text`. Name yours with data.columns, for example "
        "`columns: {prompt: question, completion: answer}`"
    )


def encoder(
    tokenizer, *, kind: str, max_length: int, assistant_only: bool
) -> Callable[[dict], dict]:
    """A function from one example to `input_ids` and `labels`, both cut at `max_length`.

    Raises ValueError when chat messages meet a tokenizer without chat template, and RowError for
    an example that the template refuses.
    """
    to_pieces = {
        "messages": _message_pieces,
        "prompt_completion": _prompt_pieces,
        "text": _text_pieces,
    }

    def encode(example: dict) -> dict:
        ids, trained = encode_pieces(tokenizer, to_pieces[kind](tokenizer, example))
        if not assistant_only:
            trained = [True] * len(ids)
        labels = [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]
        labels[:1] = [IGNORE_INDEX]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    return encode


def encode_pieces(tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Token ids of the joined pieces, and for each whether it lies in a trained piece.

    The text is tokenized as a whole where no token crosses a border between pieces. Where one does,
    the pieces are tokenized apart, as they are when a model is prompted; a tokenizer that puts a
    space before each piece would change the text by that, so there the crossing token counts as
    belonging to the piece in which it starts.
    """
    pieces = [piece for piece in pieces if piece[0]]
    joint = _ids(tokenizer, "".join(text for text, _ in pieces))
    ends, clean, text = [], True, ""
    for piece, _ in pieces:
        text += piece
        prefix = _ids(tokenizer, text)
        common = next((i for i, (a, b) in enumerate(zip(prefix, joint)) if a != b), len(prefix))  # noqa: B905
        clean &= common == len(prefix)
        ends.append(min(common if common == len(prefix) else common + 1, len(joint)))
    if not clean:
        apart = [_ids(tokenizer, piece) for piece, _ in pieces]
        whole = [i for ids in apart for i in ids]
        if tokenizer.decode(whole) == tokenizer.decode(joint):
            return whole, [t for ids, (_, t) in zip(apart, pieces, strict=True) for _ in ids]
    trained, start = [], 0
    for end, (_, is_trained) in zip(ends, pieces, strict=True):
        trained += [is_trained] * (end - start)
        start = max(start, end)
    return joint, trained


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_pieces(tokenizer, example: dict) -> list[Piece]:
    return [(_bos(tokenizer), False), (example["text"], True), (tokenizer.eos_token or "", True)]


def _prompt_pieces(tokenizer, example: dict) -> list[Piece]:
    """Prompt and completion, as strings or as lists of messages; a mix becomes messages."""
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        end = (tokenizer.eos_token or "", True)
        return [(_bos(tokenizer), False), (prompt, False), (completion, True), end]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return message_pieces(tokenizer, prompt + completion, first_trained=len(prompt))


def _message_pieces(tokenizer, example: dict) -> list[Piece]:
    return message_pieces(tokenizer, example["messages"], tools=example.get("tools"))


def _bos(tokenizer) -> str:
    """The token that this tokenizer puts before a text by itself, if any."""
    starts = tokenizer.bos_token_id is not None and (
        tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    )
    return tokenizer.bos_token if starts else ""


def message_pieces(tokenizer, messages: list[dict], *, first_trained: int = 0, tools=None):
    """The rendered conversation, cut where assistant turns (from `first_trained` on) begin and end.

    A turn ends after the token that closes it, so that the model learns to stop.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "data: the examples are chat messages, but the tokenizer has no chat template. Use the "
            "instruction-tuned model, set model.chat_template to a Jinja file, or use columns "
            "`prompt` and `completion` with plain strings"
        )

    def render(some: list[dict], prompting: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                some, tokenize=False, add_generation_prompt=prompting, tools=tools
            )
        except (TemplateError, TypeError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    full, pieces, at = render(messages), [], 0
    for i, message in enumerate(messages):
        if i < first_trained or message["role"] != "assistant":
            continue
        start, end = _turn(render, tokenizer, messages, i, full)
        start = max(start, at)
        pieces += [(full[at:start], False), (full[start:end], True)]
        at = end
    return [*pieces, (full[at:], False)]


def _turn(render, tokenizer, messages: list[dict], i: int, full: str) -> tuple[int, int]:
    """Where turn `i` begins and ends in `full`.

    Most templates render a conversation's beginning as the beginning of the conversation. Some edit
    earlier turns (reasoning is dropped from all but the last): there the turn is what changes in
    `full` when its content does, up to and with the special token that follows.
    """
    before, until = render(messages[:i], prompting=True) if i else "", render(messages[: i + 1])
    changed = render([*messages[:i], {**messages[i], "content": _SENTINEL}, *messages[i + 1 :]])
    start = changed.find(_SENTINEL)
    if i and full.startswith(before):
        start = len(before)
    if full.startswith(until):
        return start, len(until.rstrip())
    if start < 0:
        raise RowError(f"the chat template does not show the content of message {i + 1}")
    end = len(full) - (len(changed) - changed.find(_SENTINEL) - 1)
    closing = [t for t in tokenizer.all_special_tokens if full[end:].lstrip().startswith(t)]
    if closing:
        end = full.index(max(closing, key=len), end) + len(max(closing, key=len))
    return start, end
