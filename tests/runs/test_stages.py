"""Training that begins from what an earlier run has left: an adapter, or a whole model."""

import json
import shutil

import pytest
import tiny
import torch
from run_folders import run
from safetensors.torch import load_file


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
