"""One training example to token ids and labels: chat messages, prompt and completion, or text.

Labels are `IGNORE_INDEX` wherever the model is not to be trained: prompts, other speakers' turns,
and the first token, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from liger_trainer.runs.data.conversation import Conversation, require_template
from liger_trainer.runs.data.rows import RowError

IGNORE_INDEX = -100

_SENTINEL = "\x01"  # no template strips it and no text holds it

Piece = tuple[str, bool]  # (text, whether it is trained on)


def encoder(
    tokenizer, *, kind: str, max_length: int, assistant_only: bool
) -> Callable[[dict], dict]:
    """Return a function from one example to `input_ids` and `labels`, both cut at `max_length`;
    with `length`, how many there were before, and `unshown`, the reasoning fields that the chat
    template leaves out.

    Raises ValueError when chat messages meet a tokenizer without chat template, and RowError for
    an example that the template refuses, or whose tools or tool calls it leaves out.
    """
    to_pieces = {
        "messages": _message_pieces,
        "prompt_completion": _prompt_pieces,
        "text": _text_pieces,
    }

    def encode(example: dict) -> dict:
        unshown = []
        if kind == "tokenized":
            ids, labels = given_ids(example, len(tokenizer))
        else:
            pieces, unshown = to_pieces[kind](tokenizer, example)
            ids, trained = encode_pieces(tokenizer, pieces)
            if not assistant_only:
                trained = [True] * len(ids)
            labels = [i if t else IGNORE_INDEX for i, t in zip(ids, trained, strict=True)]
        labels[:1] = [IGNORE_INDEX]
        return {
            "input_ids": ids[:max_length],
            "labels": labels[:max_length],
            "length": len(ids),
            "unshown": unshown,
        }

    return encode


def given_ids(example: dict, vocabulary: int) -> tuple[list[int], list[int]]:
    """Ids and labels of an example that is tokenized already, without its padding.

    Without `labels`, all tokens are trained on. Raises RowError for ids and labels outside the
    vocabulary, columns of unequal lengths, and a mask with holes.
    """
    found = {"input_ids": example["input_ids"]}
    found |= {n: example[n] for n in ("labels", "attention_mask") if example.get(n) is not None}
    for name, values in found.items():
        if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
            raise RowError(f"`{name}` is not a list of integers")
        if len(values) != len(found["input_ids"]):
            raise RowError(
                f"`{name}` has {len(values)} entries, `input_ids` has {len(found['input_ids'])}"
            )
    ids, labels = found["input_ids"], found.get("labels", found["input_ids"])
    mask = found.get("attention_mask", [1] * len(ids))
    seen = [i for i, m in enumerate(mask) if m]
    start, end = (seen[0], seen[-1] + 1) if seen else (0, 0)
    if len(seen) != end - start:
        raise RowError("`attention_mask` hides tokens between others")
    ids, labels = list(ids[start:end]), list(labels[start:end])
    for name, values, also in (("input_ids", ids, ()), ("labels", labels, (IGNORE_INDEX,))):
        wrong = next((v for v in values if not 0 <= v < vocabulary and v not in also), None)
        if wrong is not None:
            raise RowError(
                f"`{name}` holds {wrong}, outside the tokenizer's vocabulary of {vocabulary}"
            )
    return ids, labels


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
        common = _shared(prefix, joint)
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


def _shared(a: Sequence, b: Sequence) -> int:
    """How many elements `a` and `b` have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    end = (tokenizer.eos_token or "", True)
    return [(_bos(tokenizer), False), (example["text"], True), end], []


def _prompt_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    """Prompt and completion, as strings or as lists of messages; a mix becomes messages."""
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        end = (tokenizer.eos_token or "", True)
        return [(_bos(tokenizer), False), (prompt, False), (completion, True), end], []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _spoken(tokenizer, prompt + completion, example, len(prompt))


def _message_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    return _spoken(tokenizer, example["messages"], example, 0)


def _spoken(
    tokenizer, messages: list[dict], example: dict, first_trained: int
) -> tuple[list[Piece], list[str]]:
    require_template(tokenizer)
    conversation = Conversation.of(tokenizer, messages, example)
    return turn_pieces(conversation, first_trained), conversation.unshown()


def _bos(tokenizer) -> str:
    """Return the token that this tokenizer puts before a text by itself, if any."""
    starts = tokenizer.bos_token_id is not None and (
        tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    )
    return tokenizer.bos_token if starts else ""


def turn_pieces(conversation: Conversation, first_trained: int) -> list[Piece]:
    """Return the rendered conversation, cut where assistant turns (from `first_trained` on) begin
    and end.

    A turn ends after the token that closes it, so that the model learns to stop.
    """
    full, pieces, at = conversation.render(), [], 0
    for i, message in enumerate(conversation.messages):
        if i < first_trained or message["role"] != "assistant":
            continue
        start, end = _turn(conversation, i, full)
        start = max(start, at)
        pieces += [(full[at:start], False), (full[start:end], True)]
        at = end
    return [*pieces, (full[at:], False)]


def _turn(conversation: Conversation, i: int, full: str) -> tuple[int, int]:
    """Where turn `i` begins and ends in `full`.

    Most templates render a conversation's beginning as the beginning of the conversation. Some edit
    earlier turns (reasoning is dropped from all but the last): there the turn is what changes in
    `full` when an answer of one character takes its place, up to and with the special token that
    follows.
    """
    messages, render = conversation.messages, conversation.render
    before, until = render(messages[:i], prompting=True) if i else "", render(messages[: i + 1])
    stable = bool(i) and full.startswith(before)
    if full.startswith(until) and stable:
        return len(before), len(until.rstrip())
    answer = {"role": messages[i]["role"], "content": _SENTINEL}
    changed = render([*messages[:i], answer, *messages[i + 1 :]])
    place = changed.find(_SENTINEL)
    if place < 0:
        raise RowError(f"the chat template does not show the content of message {i + 1}")
    start = len(before) if stable else _shared(full, changed[:place])
    if full.startswith(until):
        return start, len(until.rstrip())
    end = len(full) - (len(changed) - place - 1)
    special = conversation.tokenizer.all_special_tokens
    closing = [t for t in special if full[end:].lstrip().startswith(t)]
    if closing:
        end = full.index(max(closing, key=len), end) + len(max(closing, key=len))
    return start, end
