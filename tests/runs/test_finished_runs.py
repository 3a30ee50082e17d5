"""Stages of training, and the commands that come after a run; `push` is in `test_push.py`."""

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
import tiny
import torch
from run_folders import run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liger_trainer.runs import load, packages
from liger_trainer.runs.finished import open_run
from liger_trainer.runs.load import ModelArguments, load_model, load_tokenizer

AFTER = {
    "evaluate": [],
    "generate": ["--prompts", "prompts.txt"],
    "chat": [],
    "merge": [],
    "push": ["--to", "me/model"],
}


# Stages


def adapter_weights(path):
    return load_file(path / "adapter_model.safetensors")


def test_an_adapter_is_trained_further(here, tmp_path):
    """Without a step that changes anything, what comes out is what went in."""
    overrides = ["peft=null", "model.name_or_path=lora", "training.learning_rate=0"]
    out = tmp_path / "next"
    assert run("train", "lora.yaml", *overrides, f"training.output_dir={out}") == 0
    before, after = adapter_weights(here / "lora"), adapter_weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(weight.abs().max() > 0 for name, weight in after.items() if "lora_B" in name)
    # The base of the second is that of the first, and is found without it.
    assert json.loads((out / "run.json").read_text())["base"]["name_or_path"] == str(here / "model")


@pytest.mark.parametrize("first", ["full", "lora"])
def test_dpo_begins_from_a_run(here, tmp_path, first):
    pytest.importorskip("trl")
    values = tiny.alignment_values(tmp_path, "dpo", max_steps=1)
    values["model"]["name_or_path"] = first
    assert run("train", tiny.write_recipe(tmp_path, values)) == 0
    held_out = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["held_out"]
    assert held_out["rewards/margins"][0] == 0  # the reference is the model that it began from
    assert held_out["rewards/margins"][1] != 0
    assert (tmp_path / "out" / "adapter_config.json").exists() == (first == "lora")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.yaml", "model.name_or_path=lora"], "is an adapter already; remove the section"),
        (["full.yaml", "model.name_or_path=./cut"], "the run in cut is interrupted, not finished"),
        (["full.yaml", "model.name_or_path=./gone"], "the model of the run in gone is gone"),
    ],
)
def test_what_no_stage_can_begin_from(here, capsys, words, message):
    """The model in `cut` is whole, but not that of the run that was to extend it."""
    record = json.loads((here / "full" / "run.json").read_text())
    if not (here / "gone").exists():
        shutil.copytree(here / "full", here / "cut", dirs_exist_ok=True)
        (here / "cut" / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
        (here / "gone").mkdir()
        (here / "gone" / "run.json").write_text(json.dumps(record))
    assert run("train", *words, "training.output_dir=other") == 2
    assert message in capsys.readouterr().err


# After training


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        (command, name, message)
        for command in AFTER
        for name, message in (
            ("nowhere", "there is no folder"),
            ("model", "holds no run"),
            ("cut", "not finished"),
        )
        if (command, name) != ("chat", "model")  # any model can be talked to
    ],
)
def test_there_must_be_a_finished_run(here, capsys, command, name, message):
    (here / "cut").mkdir(exist_ok=True)
    record = json.loads((here / "full" / "run.json").read_text()) | {"state": "interrupted"}
    (here / "cut" / "run.json").write_text(json.dumps(record))
    before = sorted(here.rglob("*"))
    assert run(command, name, *AFTER[command]) == 2
    assert message in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_merge_makes_the_same_model_without_an_adapter(here, tmp_path, capsys):
    into = tmp_path / "merged"
    assert run("merge", "lora", "--into", into) == 0
    assert not (into / "adapter_config.json").exists()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(into)(ids).logits
        adapted = load_model(ModelArguments("lora"))(ids).logits
        base = load_model(ModelArguments("model"))(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-3)
    assert (merged - base).abs().max() > 1e-2
    assert load_tokenizer(ModelArguments(str(into))).chat_template
    assert run("merge", "lora", "--into", into) == 2
    assert run("merge", "full") == 2
    assert "holds a whole model already" in capsys.readouterr().err
    assert not (here / "full-merged").exists()


@pytest.mark.parametrize("name", ["full", "lora"])
def test_evaluate_gives_what_the_run_recorded(here, capsys, name):
    capsys.readouterr()
    assert run("evaluate", name, "--json") == 0
    printed = capsys.readouterr().out
    now = json.loads(printed[printed.rindex("{\n") :])
    recorded = json.loads((here / name / "run.json").read_text())["summary"]["eval_loss_after"]
    assert now["loss"] == pytest.approx(recorded, rel=1e-5)


def test_evaluate_needs_something_held_out(here, capsys):
    assert run("evaluate", "full", "data.eval_fraction=0") == 2
    assert "the recipe has no held-out examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "override", "changed"),
    [
        ("full", "peft.r=2", "peft: none -> some"),
        ("full", "method=reward", "method: sft -> reward"),
        ("full", "model.name_or_path=lora", " -> lora"),
        ("full", "model.config={rope_theta: 5.0}", "model.config: None -> {'rope_theta': 5.0}"),
        ("lora", "peft.lora_alpha=4", "peft.lora_alpha: 64 -> 4"),
        ("lora", "peft=null", "peft: some -> none"),
    ],
)
def test_evaluate_keeps_what_was_trained(here, capsys, name, override, changed):
    """With another scale, an adapter's weights would load, and be another model."""
    assert run("evaluate", name, override) == 2
    error = capsys.readouterr().err
    assert f"the weights in {name} are of another recipe (" in error
    assert changed in error


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["evaluate", "full", "training.deepspeed=z.json"], ["deepspeed"]),
        (["evaluate", "full", "model.attn_implementation=flash_attention_2"], ["flash-attn"]),
        (["evaluate", "full", "training.optim=lomo"], []),
        (["chat", "attending"], ["flash-attn", "peft"]),
        (["generate", "attending", "--prompts", "prompts.txt"], ["flash-attn"]),
        (["merge", "attending"], ["peft"]),
        (["inspect", "quantized.gguf"], ["gguf"]),
    ],
)
def test_missing_packages_are_named_before_anything_is_loaded(
    here, capsys, monkeypatch, words, found
):
    if not (here / "attending").exists():
        shutil.copytree(here / "lora", here / "attending")
        record = json.loads((here / "lora" / "run.json").read_text())
        record["recipe"]["model"]["attn_implementation"] = "flash_attention_2"
        (here / "attending" / "run.json").write_text(json.dumps(record))
    (here / "quantized.gguf").touch()
    (here / "prompts.txt").write_text("hello")
    monkeypatch.setattr(packages, "installed", lambda *names: False)
    monkeypatch.setattr(load, "folder", lambda arguments: pytest.fail("it is being loaded"))
    if not found:
        with pytest.raises(pytest.fail.Exception, match="being loaded"):
            run(*words)
        return
    capsys.readouterr()
    assert run(*words) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    for name in found:
        assert f"needs the package {name}, which is not installed: `pip install {name}`" in error


def test_generate_shows_both_models(here, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "what is two ?"}]
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("what ?", chat)))
    words = ["generate", "full", "--prompts", prompts, "--new-tokens", "4"]
    assert run(*words, "--output", tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "what ?"}], chat]
    assert all(row["base"] != row["tuned"] for row in rows)
    capsys.readouterr()
    assert run(*words) == 0
    assert rows[0]["tuned"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("\n", "is empty"),
        ("{", "line 1 of"),
        ('{"prompt": 5}', "`prompt` is 5"),
        ("[1]", "`prompt` is missing"),
    ],
)
def test_bad_prompts_are_told_in_one_line(here, tmp_path, capsys, text, message):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    output = tmp_path / "out.jsonl"
    assert run("generate", "full", "--prompts", path, "--output", output) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b'[{"prompt": "a"}]', "is neither .txt, with a prompt on each line, nor .jsonl"),
        ("p.txt", b"caf\xe9", "is not UTF-8 text"),
    ],
)
def test_prompts_are_text_or_json_lines(here, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run("generate", "full", "--prompts", tmp_path / name) == 2
    assert message in capsys.readouterr().err


def test_chat_answers_until_the_input_ends(here, capsys, monkeypatch):
    said = iter(["what is two ?", "/new", "", "the cat ?"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or end())
    assert run("chat", "lora", "--new-tokens", "3") == 0


def test_chat_takes_any_model(here, monkeypatch):
    for model in (here / "model", str(here / "model").replace(str(here), ".")):
        said = iter(["what is two ?"])
        monkeypatch.setattr("builtins.input", lambda _, said=said: next(said, None) or end())
        assert run("chat", model, "--new-tokens", "3") == 0


def end():
    raise EOFError


def test_the_report_shows_completions_before_and_after(here):
    sample = json.loads((here / "full" / "run.json").read_text())["samples"][0]
    assert sample["before"] != sample["after"]
    page = unescape((here / "full" / "report.html").read_text())
    for key in ("prompt", "expected", "before", "after"):
        assert sample[key] in page


def test_a_run_is_opened_with_its_own_recipe(here):
    opened = open_run(Path("lora"), ["training.seed=5"])
    assert opened.is_adapter
    assert opened.recipe.values["training"]["seed"] == 5
    assert opened.tuned.name_or_path == "lora"


def test_inspect_shows_the_adapter(here, capsys):
    assert run("inspect", "lora", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["coverage"]["lora"] == {"swapped": 14, "eligible": 14}


# What is damaged


@pytest.fixture
def damaged(here, tmp_path):
    """Return a function that copies the run `lora` and changes the copy."""

    def make(change) -> Path:
        copy = tmp_path / "run"
        shutil.copytree(here / "lora", copy)
        change(copy / "adapter_model.safetensors", copy / "adapter_config.json")
        return copy

    return make


def cut_off(weights, config):
    weights.write_bytes(weights.read_bytes()[:200])


def of_another_model(weights, config):
    save_file({k: v.repeat(1, 2) for k, v in load_file(weights).items()}, weights)


def without_weights(weights, config):
    weights.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, "cannot be loaded: "),
        (of_another_model, "its weights are those of another model"),
        (without_weights, "put the adapter's weights there, or train it again"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "merge"])
def test_a_damaged_adapter_is_told_in_one_line(here, damaged, capsys, command, change, message):
    (here / "prompts.txt").write_text("the cat")
    path = damaged(change)
    before = sorted(path.parent.rglob("*"))
    assert run(command, path, *AFTER[command]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert len(errors[0]) < 400
    assert sorted(path.parent.rglob("*")) == before


def test_an_adapter_without_a_base_is_refused(here, tmp_path, capsys):
    copy = tmp_path / "adapter"
    shutil.copytree(here / "lora", copy)
    (copy / "run.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": None})
    (copy / "adapter_config.json").write_text(text)
    words = ["peft=null", f"model.name_or_path={copy}", f"training.output_dir={tmp_path / 'out'}"]
    assert run("train", "lora.yaml", *words) == 2
    assert "names no base: write the hub name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "full", "--prompts", "prompts.txt", "--output", "lora"],
            "not a regular file",
        ),
        (
            ["generate", "full", "--prompts", "prompts.txt", "--output", "no/x"],
            "there is no folder",
        ),
        (["merge", "lora", "--into", "full.yaml/x"], "there is no folder"),
        (["merge", "lora", "--into", "full"], "exists already"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_loaded(here, capsys, words, message):
    (here / "prompts.txt").write_text("the cat")
    before = sorted(here.rglob("*"))
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before
