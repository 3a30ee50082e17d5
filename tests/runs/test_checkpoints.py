"""A run goes on from its newest complete checkpoint, or says why it cannot."""

import json
from pathlib import Path

import pytest
import torch
from run_folders import state, train
from safetensors.torch import load_file

from liger_trainer.runs import checkpoints
from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.recipe.recipe import load_recipe


def damage(checkpoint, how):
    if how == "not saved to the end":
        (checkpoint / checkpoints.MANIFEST).unlink()
    elif how == "is not as it was saved":
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "model.safetensors is not":
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(b"\0" * weights.stat().st_size)
    elif how == "cannot be read":
        (checkpoint / checkpoints.MANIFEST).write_text('{"run": "')
    else:
        (checkpoint / how.split()[0]).unlink()


@pytest.mark.parametrize(
    "how",
    [
        "optimizer.pt is missing",
        "scheduler.pt is missing",
        "rng_state.pth is missing",
        "trainer_state.json is missing",
        "not saved to the end",
        "is not as it was saved",
        "model.safetensors is not",
        "cannot be read",
    ],
)
def test_the_newest_complete_checkpoint_counts(finished, how):
    damage(finished / "checkpoint-6", how)
    found, passed = checkpoints.newest(finished, state(finished)["id"])
    assert found == finished / "checkpoint-4"
    assert len(passed) == 1
    assert "checkpoint-6 is left aside" in passed[0]
    assert how in passed[0]


def test_a_checkpoint_of_another_run_does_not_count(finished):
    assert checkpoints.newest(finished, "another")[0] is None


def test_resuming_past_a_damaged_checkpoint_gives_the_same_model(finished, capsys):
    expected = load_file(finished / "model.safetensors")
    damage(finished / "checkpoint-6", "optimizer.pt is missing")
    interrupted = state(finished) | {"state": "interrupted"}
    (finished / "run.json").write_text(json.dumps(interrupted))
    assert train("recipe.yaml", "--resume", "training.logging_steps=3") == 0
    printed = capsys.readouterr().out
    assert "checkpoint-6 is left aside: optimizer.pt is missing" in printed
    assert "resuming from out/checkpoint-4" in printed
    got = load_file(finished / "model.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_that_was_killed_after_its_last_step_is_finished(finished):
    """No step is left, and none more is made."""
    expected = (finished / "model.safetensors").read_bytes()
    (finished / "model.safetensors").unlink()
    (finished / "run.json").write_text(json.dumps(state(finished) | {"state": "running"}))
    assert train("recipe.yaml", "--resume") == 0
    assert (finished / "model.safetensors").read_bytes() == expected
    assert state(finished)["state"] == "finished"


def test_a_finished_run_can_be_extended(finished, capsys):
    assert train("recipe.yaml", "--resume") == 2
    assert "is finished; extend it with a larger training.max_steps" in capsys.readouterr().err
    assert train("recipe.yaml", "--resume", "training.max_steps=4") == 2
    assert "has done 6 steps, and this recipe asks for 4" in capsys.readouterr().err
    assert train("recipe.yaml", "--resume", "training.max_steps=7") == 0
    assert "resuming from out/checkpoint-6" in capsys.readouterr().out
    assert state(finished)["summary"]["steps"] == 7


def test_rewritten_data_is_noticed(finished, original, capsys):
    rows = (original / "chat.jsonl").read_text().replace("cat", "dog")
    Path("new.jsonl").write_text(rows)
    assert train("recipe.yaml", "--resume", "training.max_steps=8", "data.path=new.jsonl") == 2
    assert "the data is not what the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.logging_steps=7", "training.report_to=none", "training.run_name=x"],
        ["training.output_dir=./out"],
        ["training.seed=42", "training.weight_decay=0"],  # the defaults
        ["model.token=another", "data.path=elsewhere.jsonl"],
    ],
)
def test_what_changes_nothing_does_not_block_a_resume(finished, overrides):
    recipe = load_recipe("recipe.yaml", ["training.max_steps=8", *overrides])
    assert run_folder.refusal(recipe, resume=True, processes=1) is None


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["training.learning_rate=1"], 1, "learning_rate: 0.01 -> 1.0"),
        (["peft.r=4"], 1, "peft: none -> some"),
        (["training.max_steps=8"], 2, "had 1 processes, this one has 2"),
    ],
)
def test_what_changes_the_model_blocks_a_resume(finished, overrides, processes, message):
    recipe = load_recipe("recipe.yaml", overrides)
    assert message in run_folder.refusal(recipe, resume=True, processes=processes)


def test_rotation_keeps_the_newest_the_best_and_what_is_not_ours(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.begin(tmp_path / f"checkpoint-{step}", "ours")
        checkpoints.complete(tmp_path / f"checkpoint-{step}", "ours")
    (tmp_path / "checkpoint-paper-best").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    checkpoints.rotate(tmp_path, "ours", 2, keep="elsewhere/checkpoint-4")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"checkpoint-4", "checkpoint-8", "checkpoint-paper-best", "checkpoint-1"}
