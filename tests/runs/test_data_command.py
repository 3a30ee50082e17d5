"""`liger-trainer data`: what is shown is what the trainer is given."""

import json

import pytest
import tiny

from liger_trainer import cli
from liger_trainer.runs.build import build_trainer
from liger_trainer.runs.data.tokenize import IGNORE_INDEX
from liger_trainer.runs.recipe.recipe import load_recipe


def run(recipe, *arguments):
    return cli.main(["data", str(recipe), *map(str, arguments)])


@pytest.fixture
def shown(capsys):
    """A function that runs the command and gives what it prints as JSON."""

    def shown(recipe, *arguments):
        capsys.readouterr()
        assert run(recipe, "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    return shown


@pytest.fixture
def recipe(tmp_path):
    return tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path))


def test_the_tokens_are_those_that_are_trained_on(recipe, shown):
    parsed = load_recipe(recipe)
    trainer, _ = build_trainer(parsed, parsed.training_arguments())
    given = trainer.train_dataset
    found = shown(recipe, "--rows", len(given))
    assert len(found["rows"]) == len(given)
    for (sequence,), row in zip(found["rows"], given, strict=True):
        assert [token["id"] for token in sequence["tokens"]] == row["input_ids"]
        labels = [t["id"] if t["trained"] else IGNORE_INDEX for t in sequence["tokens"]]
        assert labels == row["labels"]
    counts = found["counts"]["training"]
    lengths = sorted(len(row["input_ids"]) for row in given)
    assert counts["tokens"] == sum(lengths)
    assert counts["trained"] == sum(i != IGNORE_INDEX for row in given for i in row["labels"])
    assert (counts["lengths"]["min"], counts["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert found["counts"]["held-out"]["examples"] == len(trainer.eval_dataset)


def test_what_is_cut_and_left_out_is_counted(tmp_path, recipe, shown):
    rows = [{"text": "the cat"}, {"text": " "}, {"text": "the cat sat on the mat " * 9}]
    path = tiny.json_lines(tmp_path / "rows.jsonl", rows)
    data = [f"data.path={path}", "data.eval_fraction=null", "data.invalid=drop"]
    found = shown(recipe, *data, "data.max_length=16")
    counts = found["counts"]["training"]
    assert (counts["examples"], counts["dropped"], counts["cut"]) == (2, 1, 1)
    assert counts["lengths"]["max"] == 16
    assert "held-out" not in found["counts"]
    assert "left out 1 of 3" in found["notes"][0]
    assert "cut 1 of 2" in found["notes"][1]
    packed = shown(recipe, "data.packing=true")["counts"]["training"]
    assert packed["packed_rows"] < packed["examples"]


def test_both_sides_of_a_pair_are_shown(tmp_path, shown, capsys):
    recipe = tiny.write_recipe(tmp_path, tiny.alignment_values(tmp_path, "dpo"))
    found = shown(recipe, "--rows", 1)
    names = [sequence["name"] for sequence in found["rows"][0]]
    texts = ["".join(t["text"] for t in s["tokens"] if t["trained"]) for s in found["rows"][0]]
    assert names == ["chosen", "rejected"]
    assert texts[0].endswith("sat<|im_end|>")
    assert texts[1].endswith("mat ?<|im_end|>")
    assert found["counts"]["training"]["cut"] == 0
    shorter = max(len(s["tokens"]) for s in found["rows"][0]) - 1
    cut = shown(recipe, f"data.max_length={shorter}", "data.invalid=drop")
    assert cut["counts"]["training"]["cut"] > 0
    recipe = tiny.write_recipe(tmp_path, tiny.alignment_values(tmp_path, "grpo"))
    (prompt,) = shown(recipe, "--rows", 1)["rows"][0]
    assert "".join(t["text"] for t in prompt["tokens"]).endswith("<|im_start|>assistant\n")
    assert not any(t["trained"] for t in prompt["tokens"])


def test_the_first_rows_of_a_stream_are_counted(recipe, shown):
    found = shown(recipe, "data.streaming=true", "data.eval_fraction=null")
    assert found["counts"]["training"]["examples"] == 24


def test_trained_tokens_are_colored_on_a_terminal_and_marked_in_a_file(recipe, capsys, monkeypatch):
    assert run(recipe, "--rows", 1) == 0
    text = capsys.readouterr().out
    assert text.count("⟦") == 1
    assert "⟦the cat sat on" in text
    assert "<|im_end|>⟧" in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert run(recipe, "--rows", 1) == 0
    text = capsys.readouterr().out
    assert "\x1b[1;32mthe cat sat on" in text
    assert "⟦" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "-1"], "--rows is -1"),
        (["data.path=missing.jsonl"], "no file 'missing.jsonl'"),
        (["data.path=[]"], "data.path: [] is neither a path"),
        (["data.max_length=2"], "data.max_length (2 tokens): raise it"),
        (["data.streaming=true"], "data.eval_fraction: not for data.streaming"),
        (["data.pth=a"], "did you mean 'path'?"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(recipe, capsys, arguments, message):
    assert run(recipe, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
