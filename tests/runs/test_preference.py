"""Preference examples: found by their columns, brought to one form, refused where they teach
nothing."""

import pytest
import tiny

from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.splits import load_splits
from liger_trainer.runs.data.task import Purpose

CHAT = [
    {"role": "user", "content": "what is two ?"},
    {"role": "assistant", "content": "four ."},
    {"role": "user", "content": "the cat ?"},
    {"role": "assistant", "content": "sat on the mat"},
]
PAIR = {"prompt": "what is two ?", "chosen": " four .", "rejected": " mat ."}
LABELED = {"prompt": "what is two ?", "completion": " four .", "label": True}


def examples_of(tmp_path, rows, kind, *, tokenizer=None, needed=(), **fields):
    """What the trainer of a method is given for a file of `rows`."""
    path = tiny.json_lines(tmp_path / "examples.jsonl", rows)
    data = DataArguments(path=str(path), **{"max_length": 64} | fields)
    tokenizer = tokenizer or tiny.tokenizer()
    return prepare(data, tokenizer, Purpose(kind, needed), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": " "}, "`chosen` is empty"),
        ({"rejected": ""}, "`rejected` is empty"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"rejected": PAIR["chosen"]}, "`chosen` and `rejected` are equal"),
        ({"prompt": "what is two " * 30}, r"prompt alone fills data\.max_length \(64 tokens\)"),
        ({"chosen": "the cat " * 60, "rejected": "the cat " * 60 + "sat"}, "differ only after"),
    ],
)
def test_a_pair_that_cannot_be_trained_on_is_named_or_left_out(tmp_path, changes, message):
    rows = [PAIR, PAIR | changes, PAIR]
    with pytest.raises(ValueError, match=rf"cannot train on 1 of 3 training examples.*{message}"):
        examples_of(tmp_path, rows, "pairs")
    prepared = examples_of(tmp_path, rows, "pairs", invalid="drop")
    assert prepared.train[:] == {key: [value] * 2 for key, value in PAIR.items()}
    assert "left out 1 of 3 training examples" in prepared.notes[0]
    with pytest.raises(ValueError, match="nothing is left"):
        examples_of(tmp_path, [PAIR | changes], "pairs", invalid="drop")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairs", {"prompt": "a", "chosen": "b", "reject": "c"}, r"'rejected'.*rejected: reject}"),
        ("labeled", {"prompt": "a", "answer": "b", "label": True}, r"no column 'completion'"),
        ("pairs", PAIR | {"chosen": 4}, r"`chosen` is 4|column 'chosen' is of type int64"),
        ("pairs", PAIR | {"chosen": None}, r"`chosen` is (missing|empty)"),
        ("prompts", {"question": "a"}, r"no column 'prompt' among question"),
        ("labeled", LABELED | {"label": 1}, r"`label` .* is of type int64; it must be true"),
        ("labeled", LABELED | {"label": "yes"}, r"is of type (large_)?string"),
        ("labeled", LABELED, r"label of all 1 training examples is true"),
        ("labeled", LABELED | {"completion": ""}, r"`completion` is empty"),
    ],
)  # fmt: skip
def test_wrong_columns_and_labels_are_named(tmp_path, kind, row, message):
    with pytest.raises(ValueError, match=message):
        examples_of(tmp_path, [row], kind)


def test_columns_that_a_reward_asks_for_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'tests'.*reward\.functions"):
        examples_of(tmp_path, [{"prompt": "a", "source": "b"}], "prompts", needed=["tests"])


def test_pairs_of_conversations_get_the_prompt_that_they_share(tmp_path):
    row = {"chosen": CHAT, "rejected": [*CHAT[:3], {"role": "assistant", "content": "no"}]}
    expected = {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": row["rejected"][3:]}
    for given in (row, row | {"prompt": CHAT[0]["content"]}):
        assert examples_of(tmp_path, [given], "pairs").train[0] == expected
    with pytest.raises(ValueError, match="is empty"):
        examples_of(tmp_path, [row, row | {"rejected": []}], "pairs")
    other = [{"role": "user", "content": "the mat ?"}, *row["rejected"][1:]]
    with pytest.raises(ValueError, match="differ before their last message"):
        examples_of(tmp_path, [row | {"rejected": other}], "pairs")


def test_strings_beside_messages_become_messages(tmp_path):
    row = PAIR | {name: [{"role": "assistant", "content": PAIR[name]}] for name in ("chosen",)}
    found = examples_of(tmp_path, [row], "pairs").train[0]
    assert found["prompt"] == [{"role": "user", "content": PAIR["prompt"]}]
    assert found["rejected"] == [{"role": "assistant", "content": PAIR["rejected"]}]


def test_a_pair_becomes_two_labeled_examples(tmp_path):
    rows = [PAIR | {"chosen": f" four {i}"} for i in range(8)]
    train = examples_of(tmp_path, rows, "labeled").train
    assert sorted(train["label"]) == [False] * 8 + [True] * 8
    assert all((" four" in row["completion"]) == row["label"] for row in train)
    assert train["label"][:] != [True] * 8 + [False] * 8  # shuffled


def test_pairs_of_one_prompt_are_on_one_side_of_the_split(tmp_path):
    path = tiny.pairs_file(tmp_path / "pairs.jsonl", 40)
    data = DataArguments(path=str(path), eval_fraction=0.25, group="group")
    splits = load_splits(data, 0)
    train, held_out = splits.train[0].rows, splits.held_out[0].rows
    assert len(set(held_out["group"])) == 1
    assert not set(train["group"]) & set(held_out["group"])
    assert len(train) + len(held_out) == 40
    with pytest.raises(ValueError, match=r"data\.group: no column 'task'.*group"):
        load_splits(DataArguments(path=str(path), eval_fraction=0.25, group="task"), 0)


def test_the_shipped_pairs_are_split_by_problem():
    splits = load_splits(DataArguments(loader="humaneval_pairs", eval_fraction=0.2), 0)
    train, held_out = splits.train[0].rows, splits.held_out[0].rows
    assert len(train) + len(held_out) > 300
    assert not set(train["task_id"]) & set(held_out["task_id"])
    assert train[0]["chosen"][0]["role"] == "assistant"
    assert train[0]["prompt"][0]["content"].startswith("Complete this Python function.")
