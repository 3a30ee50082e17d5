"""Where examples come from: files, globs, saved folders, several data sets by weight, streams."""

import gzip
import json
import os
import re
import signal
from collections import Counter

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors.torch import load_file

from liger_trainer import cli
from liger_trainer.runs.data.arguments import DataArguments, Source
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.sources import load_source
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.recipe.recipe import load_recipe
from liger_trainer.runs.report import html
from liger_trainer.runs.throughput import Throughput

TOKENIZER = tiny.tokenizer()


def texts(path, name, count):
    """A file of `count` rows, each with the data set's name and its number."""
    return str(
        tiny.json_lines(path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
    )


def prepared(seed=0, **fields):
    return prepare(DataArguments(**fields), TOKENIZER, seed=seed)


def decoded(rows):
    return [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def names_of(rows):
    """How many rows each data set of `texts` gave."""
    return Counter(text.split()[0] for text in decoded(rows))


# Files and folders


def test_files_are_read_from_lists_globs_and_compressed(tmp_path):
    a, b = texts(tmp_path, "a", 2), texts(tmp_path, "b", 3)
    packed = tmp_path / "c.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write('{"text": "c 0"}\n')
    everything = load_source(Source(path=[a, b, str(packed)]))
    assert everything["text"][:] == ["a 0", "a 1", "b 0", "b 1", "b 2", "c 0"]
    assert load_source(Source(path=str(tmp_path / "?.jsonl")))["text"][:] == everything["text"][:5]
    assert load_source(Source(path=str(packed)))["text"][:] == ["c 0"]
    assert len(load_source(Source(path=[a, b], split="train[:40%]"))) == 2


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ("none-*.jsonl", FileNotFoundError, "no file matches"),
        (["a.jsonl", "aa.jsonl"], FileNotFoundError, r"no file 'aa\.jsonl'.* there is a\.jsonl"),
        (["a.jsonl", "t.csv"], ValueError, "files of csv and json in one list"),
        (["a.jsonl", "some/hub"], ValueError, r"'some/hub' in a list .*data\.mix"),
        (["a.jsonl", "empty.jsonl"], ValueError, r"empty\.jsonl is empty"),
    ],
)
def test_what_is_wrong_with_a_list_of_files_is_named(tmp_path, monkeypatch, paths, error, message):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path, "a", 2)
    (tmp_path / "t.csv").write_text("text\nx\n")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(error, match=message):
        load_source(Source(path=paths))


def test_folders_of_save_to_disk_are_read(tmp_path):
    rows = Dataset.from_dict({"text": [f"a {i}" for i in range(10)]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"first": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "several")
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    assert load_source(Source(path=one))["text"][:] == rows["text"][:]
    assert load_source(Source(path=one, split="train[:20%]"))["text"][:] == ["a 0", "a 1"]
    assert load_source(Source(path=several, split="test"))["text"][:] == ["a 3"]
    with pytest.raises(ValueError, match=r"no split 'train'; the splits are first, test"):
        load_source(Source(path=several))
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"one cannot be loaded"):
        load_source(Source(path=one))


# Several data sets


def test_without_weights_every_row_is_taken_once(tmp_path):
    mix = [{"path": texts(tmp_path, name, count)} for name, count in (("a", 5), ("b", 9))]
    rows = decoded(prepared(mix=mix).train)
    assert sorted(rows) == sorted([f"a {i}" for i in range(5)] + [f"b {i}" for i in range(9)])
    assert {row[0] for row in rows[:5]} == {"a", "b"}, "shuffled"


def test_weights_are_the_shares_of_rows(tmp_path):
    mix = [
        {"path": texts(tmp_path, "a", 400), "weight": 3},
        {"path": texts(tmp_path, "b", 400), "weight": 1},
    ]
    found = prepared(mix=mix)
    counts = names_of(found.train)
    assert counts["a"] == 400, "until the first is used up"
    assert counts["b"] / counts["a"] == pytest.approx(1 / 3, rel=0.2)
    assert len(set(decoded(found.train))) == len(found.train), "nothing twice"
    again, other = prepared(mix=mix), prepared(mix=mix, seed=1)
    assert found.train["input_ids"][:] == again.train["input_ids"][:]
    assert found.train["input_ids"][:] != other.train["input_ids"][:]
    told = rf"mixed {len(found.train)} training rows: 400 from the 400 of .*a\.jsonl"
    assert re.match(told, found.notes[0])


@pytest.mark.parametrize(
    ("until", "a", "b"),
    [("all_exhausted", "more", 30), ("all_exhausted_without_replacement", 5, 30)],
)
def test_a_mix_may_go_on_until_all_are_used_up(tmp_path, until, a, b):
    sizes = {"a": 5, "b": 30}
    mix = [{"path": texts(tmp_path, n, count), "weight": 1} for n, count in sizes.items()]
    counts = names_of(prepared(mix=mix, mix_until=until).train)
    assert counts["b"] == b
    assert counts["a"] > 5 if a == "more" else counts["a"] == a


def test_held_out_rows_of_a_mix_are_trained_on_nowhere(tmp_path):
    mix = [{"path": texts(tmp_path, n, 20), "weight": 1} for n in ("a", "b")]
    found = prepared(mix=mix, eval_fraction=0.25, mix_until="all_exhausted")
    train, held_out = decoded(found.train), decoded(found.eval)
    assert not set(train) & set(held_out)
    assert Counter(text[0] for text in held_out) == {"a": 5, "b": 5}


def test_entries_of_a_mix_may_have_other_columns_and_forms(tmp_path):
    asked = [{"q": "the cat ?", "a": " sat"}, {"q": "the cat ?", "a": " "}]
    path = str(tiny.json_lines(tmp_path / "asked.jsonl", asked))
    mix = [
        {"path": texts(tmp_path, "a", 2)},
        {"path": path, "columns": {"prompt": "q", "completion": "a"}},
    ]
    with pytest.raises(ValueError, match=r"1 of 2 training examples of .*asked\.jsonl, .* row 2"):
        prepared(mix=mix)
    found = prepared(mix=mix, invalid="drop")
    assert sorted(decoded(found.train)) == ["a 0", "a 1", "the cat ? sat"]
    assert found.kind == "text, prompt_completion"


def test_pairs_are_mixed_too_and_told_apart_from_what_does_not_fit(tmp_path):
    pair = {"prompt": "the cat ?", "chosen": " sat", "rejected": " mat"}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    spoken = {k: [{"role": roles[k], "content": v}] for k, v in pair.items()}
    paths = {
        name: str(tiny.json_lines(tmp_path / f"{name}.jsonl", [row] * 3))
        for name, row in (("a", pair), ("b", pair | {"tools": "[]"}), ("c", spoken))
    }
    data = DataArguments(mix=[{"path": paths["a"]}, {"path": paths["b"]}], max_length=64)
    found = prepare(data, TOKENIZER, Purpose("pairs"), seed=0)
    assert found.train["prompt"][:] == ["the cat ?"] * 6
    assert Counter(found.train["tools"]) == {None: 3, "[]": 3}
    data = DataArguments(mix=[{"path": paths["a"]}, {"path": paths["c"]}], max_length=64)
    with pytest.raises(ValueError, match=r"column 'prompt' is Value.* in .*a\.jsonl and List"):
        prepare(data, TOKENIZER, Purpose("pairs"), seed=0)


def test_messages_with_other_keys_are_mixed(tmp_path):
    asked = {"role": "user", "content": "the cat ?"}
    answers = [{"role": "assistant", "content": said} for said in ("sat", "mat")]
    prompts = {
        "plain": [asked],
        "named": [asked | {"name": "cat"}],
        "varied": [asked, answers[0], asked | {"more": {"a": [1]}}],
    }
    mix = []
    for name, prompt in prompts.items():
        row = {"prompt": prompt, "chosen": answers[:1], "rejected": answers[1:]}
        mix.append({"path": str(tiny.json_lines(tmp_path / f"{name}.jsonl", [row]))})
    data = DataArguments(mix=mix, max_length=64)
    found = prepare(data, TOKENIZER, Purpose("pairs"), seed=0).train
    told = [[{k: v for k, v in m.items() if v is not None} for m in row] for row in found["prompt"]]
    assert all(prompt in told for prompt in prompts.values())


def test_the_labels_of_a_mix_are_checked_as_a_whole(tmp_path):
    mix = []
    for label in (True, False):
        row = {"prompt": "the cat ?", "completion": " sat", "label": label}
        mix.append({"path": str(tiny.json_lines(tmp_path / f"{label}.jsonl", [row]))})
    both, one = (DataArguments(mix=some, max_length=64) for some in (mix, mix[:1]))
    assert set(prepare(both, TOKENIZER, Purpose("labeled"), seed=0).train["label"]) == {
        True,
        False,
    }
    with pytest.raises(ValueError, match="label of all 1 training examples is true"):
        prepare(one, TOKENIZER, Purpose("labeled"), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mix": []}, "data.mix is empty"),
        ({"mix": [{"path": "a"}], "path": "b"}, r"data\.path: with data\.mix"),
        ({"mix": [{"path": "a"}], "columns": {"a": "b"}}, r"data\.columns: with data\.mix"),
        ({"mix": [{"path": "a"}], "split": "test"}, r"data\.split: with data\.mix"),
        ({"mix": ["a"]}, r"data\.mix\[0\]: expected keys and values"),
        ({"mix": [{"path": "a", "wieght": 1}]}, r"data\.mix\[0\]: unknown .* 'weight'"),
        ({"mix": [{"path": "a", "weight": "1"}]}, r"data\.mix\[0\]\.weight: '1' is not a number"),
        ({"mix": [{"path": "a", "weight": 0}]}, r"data\.mix\[0\]\.weight is 0"),
        ({"mix": [{"path": "a", "weight": 1}, {"path": "b"}]}, r"data\.mix\[1\]: no weight"),
        ({"mix": [{"weight": 1}]}, r"set exactly one of data\.mix\[0\]\.path"),
        ({"mix": [{"path": "a"}], "mix_until": "end"}, r"data\.mix_until: 'end' is none of"),
        ({"path": []}, r"data\.path: \[\] is neither a path"),
        ({"path": [1]}, r"data\.path: \[1\] is neither a path"),
    ],
)
def test_a_wrong_mix_is_told(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**fields)


def test_homes_in_a_mix_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"model": {"name_or_path": "m"}, "data": {"mix": [{"path": ["~/a.jsonl"]}]}}
    recipe = load_recipe(tiny.write_recipe(tmp_path, values))
    assert recipe.data.sources[0].path == [str(tmp_path / "a.jsonl")]


# Streams


def test_a_stream_gives_the_same_rows_in_another_order(tmp_path):
    path = texts(tmp_path, "a", 50)
    stream, again = (prepared(path=path, streaming=True).train for _ in range(2))
    assert isinstance(stream, IterableDataset)
    rows = decoded(stream)
    assert rows == decoded(again) != sorted(rows)
    assert sorted(rows) == sorted(decoded(prepared(path=path).train))
    assert set(next(iter(stream))) == {"input_ids", "labels"}
    assert len(decoded(prepared(path=path, streaming=True, max_examples=7).train)) == 7


def test_rows_of_a_stream_that_cannot_be_used_are_named_or_left_out(tmp_path):
    rows = [{"text": "a"}, {"text": " "}, {"text": "c"}]
    path = str(tiny.json_lines(tmp_path / "t.jsonl", rows))
    stream = prepared(path=path, streaming=True, invalid="drop").train
    assert sorted(decoded(stream)) == ["a", "c"]
    with pytest.raises(ValueError, match=r"row 2 of the training examples because `text` is empty"):
        list(prepared(path=path, streaming=True).train)


def test_streams_are_mixed_by_weight(tmp_path):
    mix = [{"path": texts(tmp_path, n, 300), "weight": w} for n, w in (("a", 1), ("b", 4))]
    counts = names_of(prepared(mix=mix, streaming=True).train)
    assert counts["a"] / counts["b"] == pytest.approx(1 / 4, rel=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": True}, r"data\.packing: not for data\.streaming; remove the key"),
        ({"eval_fraction": 0.1}, r"data\.eval_fraction: .*data\.eval_path or data\.eval_split"),
        ({"num_proc": 2}, r"data\.num_proc: .*dataloader_num_workers"),
        ({"split": "train[:10%]"}, r"data\.split: a stream has no slice"),
        ({"path": None, "mix": [{"path": "a"}, {"path": "b"}]}, r"give each of them a weight"),
    ],
)
def test_what_a_stream_cannot_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"path": "a.jsonl", "streaming": True} | fields)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that streams a mix and holds out a file of its own."""
    monkeypatch.setattr(html, "plots", lambda log: [])
    values = tiny.recipe_values(tmp_path)
    held_out = values["data"].pop("path")
    del values["data"]["eval_fraction"]
    mix = [{"path": texts(tmp_path, n, 9), "weight": w} for n, w in (("a", 1), ("b", 2))]
    values["data"] |= {"mix": mix, "eval_path": held_out}
    return tiny.write_recipe(tmp_path, values)


def train(recipe, *arguments):
    return cli.main(["train", str(recipe), *arguments])


def test_a_stream_without_a_number_of_steps_is_refused(recipe, capsys):
    streaming = "data.streaming=true"
    assert train(recipe, streaming, "training.max_steps=-1") == 2
    assert "data.streaming: a stream has no known length" in capsys.readouterr().err
    assert train(recipe, streaming, "training.max_steps=-1", "--dry-run") == 1
    assert "set training.max_steps" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["orpo", "cpo", "simpo"])
def test_a_stream_is_not_for_trainers_that_tokenize_all_pairs_first(tmp_path, capsys, method):
    values = tiny.alignment_values(tmp_path, method)
    values["data"]["streaming"] = True
    assert train(tiny.write_recipe(tmp_path, values)) == 2
    assert f"data.streaming: not for {method}; remove the key" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_an_interrupted_run_on_a_mix_resumes_to_the_same_model(
    tmp_path, recipe, monkeypatch, streaming
):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    streamed = f"data.streaming={streaming}"
    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_step_begin", interrupt)
        assert train(recipe, streamed) == 130
    assert train(recipe, streamed, "--resume") == 0
    whole = tmp_path / "whole"
    assert train(recipe, streamed, f"training.output_dir={whole}") == 0
    runs = [json.loads((path / "run.json").read_text()) for path in (tmp_path / "out", whole)]
    assert runs[0]["summary"]["training"] == runs[1]["summary"]["training"]
    resumed, expected = (load_file(p / "model.safetensors") for p in (tmp_path / "out", whole))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_mix_that_changed_is_not_continued(tmp_path, recipe, capsys):
    assert train(recipe, "training.save_strategy=steps", "training.save_steps=3") == 0
    texts(tmp_path, "b", 10)
    assert train(recipe, "--resume", "training.max_steps=8") == 2
    assert "the data is not what the run began with" in capsys.readouterr().err
