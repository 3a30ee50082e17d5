"""Encode a training example (chat messages, prompt and completion, or text) as ids and labels.

Labels are `IGNORE_INDEX` where the model is not trained: prompts, other speakers' turns, and the
first token, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from liger_trainer.runs.data.conversation import Conversation, require_template
from liger_trainer.runs.data.rows import RowError

IGNORE_INDEX = -100

_SENTINEL = "\x01"  # templates do not strip it, and texts do not contain it

Piece = tuple[str, bool]  # (text, whether it is trained on)


def encoder(
    tokenizer, *, kind: str, max_length: int, assistant_only: bool
) -> Callable[[dict], dict]:
    """Return a function from one example to `input_ids` and `labels`, both cut at `max_length`.

    It also returns `length`, the number of tokens before the cut, and `unshown`, the reasoning
    fields that the chat template does not show. It raises ValueError for chat messages if the
    tokenizer has no chat template, and RowError for an example that the template rejects, or whose
    tools or tool calls it does not show.
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
    """Return ids and labels of an example that is already tokenized, without its padding.

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
    """Return the token ids of the joined pieces, and for each whether its piece is trained on.

    If no token crosses a border between pieces, the text is tokenized as a whole. Otherwise the
    pieces are tokenized separately, as they are when a model is prompted. If that would change the
    text (some tokenizers put a space before each piece), the text is tokenized as a whole, and a
    crossing token belongs to the piece in which it starts.
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
        separate = [_ids(tokenizer, piece) for piece, _ in pieces]
        whole = [i for ids in separate for i in ids]
        if tokenizer.decode(whole) == tokenizer.decode(joint):
            return whole, [t for ids, (_, t) in zip(separate, pieces, strict=True) for _ in ids]
    trained, start = [], 0
    for end, (_, is_trained) in zip(ends, pieces, strict=True):
        trained += [is_trained] * (end - start)
        start = max(start, end)
    return joint, trained


def _shared(a: Sequence, b: Sequence) -> int:
    """Return the length of the common prefix of `a` and `b`."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    end = (tokenizer.eos_token or "", True)
    return [(_bos(tokenizer), False), (example["text"], True), end], []


def _prompt_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    """Return the pieces of prompt and completion: strings or messages; a mix becomes messages."""
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        end = (tokenizer.eos_token or "", True)
        return [(_bos(tokenizer), False), (prompt, False), (completion, True), end], []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _conversation_pieces(tokenizer, prompt + completion, example, len(prompt))


def _message_pieces(tokenizer, example: dict) -> tuple[list[Piece], list[str]]:
    return _conversation_pieces(tokenizer, example["messages"], example, 0)


def _conversation_pieces(
    tokenizer, messages: list[dict], example: dict, first_trained: int
) -> tuple[list[Piece], list[str]]:
    require_template(tokenizer)
    conversation = Conversation.of(tokenizer, messages, example)
    return turn_pieces(conversation, first_trained), conversation.unshown()


def _bos(tokenizer) -> str:
    """Return the BOS token if this tokenizer adds it to every text, else an empty string."""
    starts = tokenizer.bos_token_id is not None and (
        tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    )
    return tokenizer.bos_token if starts else ""


def turn_pieces(conversation: Conversation, first_trained: int) -> list[Piece]:
    """Return the rendered conversation, split where assistant turns begin and end.

    Turns before message `first_trained` are not trained on. A turn includes the token that closes
    it, so that the model learns to stop.
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
    """Return where turn `i` begins and ends in `full`.

    With most templates, the rendered first messages are a prefix of the rendered conversation. Some
    templates edit earlier turns (they drop reasoning from all but the last). The turn is then the
    part of `full` that changes if a one-character answer replaces it, and the special token that
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
