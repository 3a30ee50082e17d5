"""Examples that are read while training are those of the whole data, with the same refusals."""

import json
import os
import signal

import pytest
import tiny
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from liger_trainer import cli
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.rows import RowError
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.report import html
from liger_trainer.runs.throughput import Throughput


def said(role, content):
    return {"role": role, "content": content}


def whole(i, word):
    return [said("user", f"what is {i} ?"), said("assistant", word)]


FORMS = {
    "text": lambda i: {"prompt": f"what is {i} ?", "chosen": "the cat", "rejected": "the dog"},
    "messages": lambda i: {
        "prompt": [said("user", f"what is {i} ?")],
        "chosen": [said("assistant", "the cat")],
        "rejected": [said("assistant", "the dog")],
    },
    "conversations": lambda i: {"chosen": whole(i, "the cat"), "rejected": whole(i, "the dog")},
    "prompt repeated": lambda i: {
        "prompt": f"what is {i} ?",
        "chosen": whole(i, "the cat"),
        "rejected": whole(i, "the dog"),
    },
    "text beside messages": lambda i: {
        "prompt": f"what is {i} ?",
        "chosen": [said("assistant", "the cat")],
        "rejected": [said("assistant", "the dog")],
    },
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"what is {i} ?"}],
        "chosen": {"from": "gpt", "value": "the cat"},
        "rejected": {"from": "gpt", "value": "the dog"},
    },
    "alpaca": lambda i: {"instruction": f"what is {i} ?", "chosen": "the cat", "rejected": "a dog"},
    "arguments": lambda i: {
        **{name: f"what {i} {name}" for name in ("prompt", "chosen", "rejected")},
        "chat_template_kwargs": json.dumps({f"key{i}": 1}) if i % 2 else None,
    },
}


OTHER_FORMS = {
    "labeled": [
        lambda i: {"prompt": f"what is {i} ?", "completion": "the cat", "label": i % 2 == 0},
        lambda i: {"instruction": f"what is {i} ?", "output": "the cat", "label": i % 2 == 0},
    ],
    "prompts": [
        lambda i: {"prompt": [said("user", f"what is {i} ?")], "answer": i},
        lambda i: {"instruction": f"what is {i} ?", "answer": i},
    ],
}


def prepared(folder, rows, examples="pairs", **fields):
    path = str(tiny.json_lines(folder / "rows.jsonl", rows))
    data = DataArguments(path=path, max_length=64, **fields)
    purpose = Purpose(examples, check=without_150)
    return prepare(data, tiny.tokenizer(), purpose, seed=0).train


def without_150(row):
    """As a reward function that can never reward a row."""
    if row.get("answer") == 150:
        raise RowError("an odd one out")


@pytest.mark.parametrize(
    ("examples", "form"), [(kind, form) for kind, forms in OTHER_FORMS.items() for form in forms]
)
def test_a_stream_gives_the_other_examples_too(tmp_path, examples, form):
    rows = [form(i) for i in range(30)]
    stream = prepared(tmp_path, rows, examples, streaming=True)
    assert texts(stream) == texts(prepared(tmp_path, rows, examples))
    assert len(texts(stream)) == 30


def texts(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_gives_the_pairs_of_the_whole_data(tmp_path, form):
    rows = [FORMS[form](i) for i in range(30)]
    stream = prepared(tmp_path, rows, streaming=True)
    assert isinstance(stream, IterableDataset)
    assert texts(stream) == texts(prepared(tmp_path, rows))
    assert len(texts(stream)) == 30


@pytest.mark.parametrize("at", [3, 150])  # among the rows that are checked first, and after them
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "the cat"}, "`chosen` and `rejected` are equal"),
        ({"chosen": " "}, "`chosen` is empty"),
        ({"chosen": None}, "`chosen` is missing"),
        ({"prompt": "the " * 80}, "its prompt alone fills data.max_length"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named_or_left_out(tmp_path, at, change, reason):
    rows = [FORMS["text"](i) for i in range(200)]
    rows[at] |= change
    with pytest.raises(ValueError, match=rf"row {at + 1}\b.*{reason}"):
        list(prepared(tmp_path, rows, streaming=True))
    assert len(list(prepared(tmp_path, rows, streaming=True, invalid="drop"))) == 199


@pytest.mark.parametrize(
    ("examples", "change", "reason"),
    [
        ("labeled", {"label": None}, "`label` is None, neither true nor false"),
        ("labeled", {"completion": ""}, "`completion` is empty"),
        ("prompts", {"prompt": []}, "`prompt` is empty"),
        ("prompts", {"answer": 150}, "an odd one out"),
    ],
)
def test_another_example_that_cannot_be_used_is_named(tmp_path, examples, change, reason):
    rows = [OTHER_FORMS[examples][0](i) for i in range(149)]
    rows.append(rows[0] | change)
    with pytest.raises(ValueError, match=rf"row 150\b.*{reason}"):
        list(prepared(tmp_path, rows, examples, streaming=True))


def test_pairs_do_not_stream_for_kto(tmp_path):
    with pytest.raises(ValueError, match=r"data\.streaming: pairs cannot stream for kto"):
        prepared(tmp_path, [FORMS["text"](1)], "labeled", streaming=True)


def test_a_stream_without_pairs_is_refused_before_training(tmp_path):
    rows = [{"prompt": "a", "good": "b", "rejected": "c"}] * 3
    with pytest.raises(ValueError, match="no column 'chosen' among prompt, good, rejected"):
        prepared(tmp_path, rows, streaming=True)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(html, "plots", lambda log: [])

    def of(method):
        values = tiny.alignment_values(tmp_path, method, max_steps=4)
        if method == "grpo":
            values["reward"] = {"functions": ["parses"]}
        if method == "kto":
            rows = [OTHER_FORMS["labeled"][0](i) for i in range(16)]
            values["data"]["path"] = str(tiny.json_lines(tmp_path / "labeled.jsonl", rows))
        values["data"]["streaming"] = True
        del values["data"]["eval_fraction"]
        return tiny.write_recipe(tmp_path, values)

    return of


def train(recipe, *arguments):
    return cli.main(["train", str(recipe), *arguments])


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_an_interrupted_run_on_a_stream_resumes_to_the_same_model(
    tmp_path, recipe, monkeypatch, method
):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    path = recipe(method)
    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_step_begin", interrupt)
        assert train(path) == 130
    assert train(path, "--resume") == 0
    assert train(path, f"training.output_dir={tmp_path / 'whole'}") == 0
    files = [tmp_path / name / "model.safetensors" for name in ("out", "whole")]
    resumed, expected = map(load_file, files)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    runs = [json.loads((file.parent / "run.json").read_text())["summary"] for file in files]
    assert runs[0]["tokens"] == runs[1]["tokens"] > 0


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_arguments_of_the_template_may_be_json(tmp_path, recipe, streaming):
    rows = [FORMS["arguments"](i) for i in range(12)]
    path = tiny.json_lines(tmp_path / "arguments.jsonl", rows)
    words = [f"data.path={path}", f"data.streaming={streaming}", "training.max_steps=1"]
    assert train(recipe("dpo"), *words) == 0


def test_log_probabilities_of_a_stream_are_not_computed_before(recipe, capsys):
    assert train(recipe("dpo"), "training.precompute_ref_log_probs=true") == 2
    assert "precompute_ref_log_probs: not for data.streaming" in capsys.readouterr().err
