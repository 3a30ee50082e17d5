"""Rows that cannot be trained on are named by number and reason, or left out and counted."""

import json

import pytest
import tiny

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.task import Purpose

GOOD = [{"role": "user", "content": "what is two ?"}, {"role": "assistant", "content": "four ."}]

BAD_ROWS = [
    ({"text": "the cat sat"}, {"text": 5}, "`text` is 5, which is not text"),
    ({"text": "the cat sat"}, {"text": None}, "`text` is missing"),
    ({"text": "the cat sat"}, {"text": " "}, "`text` is empty"),
    ({"messages": GOOD}, {"messages": None}, "`messages` is missing"),
    ({"messages": GOOD}, {"messages": []}, "`messages` is empty"),
    ({"messages": GOOD}, {"messages": "what ?"}, "`messages` is text"),
    ({"messages": GOOD}, {"messages": [{"content": "a"}]}, "message 1 of `messages` has no role"),
    (
        {"messages": GOOD},
        {"messages": [{"role": "user"}]},
        "message 1 of `messages` has no content",
    ),
    ({"messages": GOOD}, {"messages": ["a"]}, "message 1 of `messages` is 'a'"),
    ({"messages": GOOD}, {"messages": GOOD[:1]}, "there is nothing to train on"),
    (
        {"prompt": "what ?", "completion": "four"},
        {"prompt": "what ?", "completion": None},
        "`completion` is missing",
    ),
    (
        {"prompt": "what ?", "completion": "four"},
        {"prompt": "what ?", "completion": ""},
        "`completion` is empty",
    ),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, good, bad, reason):
    path = str(tiny.json_lines(tmp_path / "rows.jsonl", [good, good, bad, good]))
    with pytest.raises(ValueError, match=r"1 of 4 training examples, the first in row 3") as error:
        prepare(DataArguments(path=path, max_length=64), tiny.tokenizer(), seed=0)
    assert f"because {reason}" in str(error.value)
    dropping = DataArguments(path=path, max_length=64, invalid="drop")
    prepared = prepare(dropping, tiny.tokenizer(), seed=0)
    assert len(prepared.train) == 3
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert f"because {reason}" in prepared.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "`chosen` is missing"),
        ({"chosen": [{"content": "a"}]}, "message 1 of `chosen` has no role"),
        ({"prompt": 5}, "`prompt` is 5, which is neither text nor"),
        ({"rejected": "text"}, "`rejected` is text, in other rows messages"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path, change, reason):
    path = tiny.pairs_file(tmp_path / "pairs.jsonl", 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tiny.json_lines(path, [*rows[:4], rows[4] | change, rows[5]])
    strict = DataArguments(path=str(path), max_length=64)
    with pytest.raises(ValueError, match=r"1 of 6 training examples, the first in row 5") as error:
        prepare(strict, tiny.tokenizer(), Purpose("pairs"), seed=0)
    assert f"because {reason}" in str(error.value)
    dropping = DataArguments(path=str(path), max_length=64, invalid="drop")
    assert len(prepare(dropping, tiny.tokenizer(), Purpose("pairs"), seed=0).train) == 5


def test_what_a_template_refuses_is_a_row_that_cannot_be_used(tmp_path):
    refusal = "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m['content'] }}<|im_end|>{% endfor %}"
    rows = [{"messages": GOOD}, {"messages": [{"role": "tool", "content": "x"}, *GOOD]}]
    path = str(tiny.json_lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"row 2 because the chat template refuses it: no tools"):
        prepare(DataArguments(path=path), tiny.tokenizer(template), seed=0)
