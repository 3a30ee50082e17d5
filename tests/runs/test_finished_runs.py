"""The commands that take a finished run; `generate`, `chat` and `push` have files of their own."""

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
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
    monkeypatch.setattr(load, "place_of", lambda arguments: pytest.fail("it is being loaded"))
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
