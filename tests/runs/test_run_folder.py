"""An output folder is one run's: what is in it is replaced only once a run has begun."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import at_step, state, train

from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.recipe.recipe import load_recipe


def contents(folder):
    """Every file with its bytes, but for the lock."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    "override",
    [
        "data.path=nope.jsonl",
        "data.columns={messages: nope}",
        "data.max_length=2",
        "model.name_or_path=./nope",
        "model.dtype=float99",
        "training.per_device_train_batch_size=0",
        "training.report_to=[wandb]",
        "training.optim=adamw_bnb_8bit",
    ],
)
def test_overwrite_checks_first(finished, capsys, override):
    before = contents(finished)
    assert train("recipe.yaml", "--overwrite", override) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert contents(finished) == before


def test_a_run_that_fails_before_its_first_step_leaves_the_old_one(finished, monkeypatch):
    def fail():
        raise RuntimeError("no kernel image")

    before = contents(finished)
    at_step(monkeypatch, "training_step", 0, fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        train("recipe.yaml", "--overwrite")
    assert contents(finished) == before


def test_overwrite_removes_what_the_old_run_wrote_and_nothing_else(finished, capsys):
    (finished / "checkpoint-paper-best").mkdir()
    kept = ["checkpoint-paper-best/model.safetensors", "checkpoint-4/notes.txt", "mine.safetensors"]
    for name in kept:
        (finished / name).write_text("mine")
    earlier = state(finished)
    (finished / "adapter_config.json").write_text("{}")  # as a run with a peft section leaves it
    earlier["files"] += ["adapter_config.json"]
    (finished / "run.json").write_text(json.dumps(earlier))
    assert train("recipe.yaml", "--overwrite", "training.max_steps=1") == 0
    assert not (finished / "adapter_config.json").exists()
    assert not (finished / "checkpoint-6").exists()
    assert [p.name for p in (finished / "checkpoint-4").iterdir()] == ["notes.txt"]
    assert all((finished / name).read_text() == "mine" for name in kept)
    assert state(finished)["summary"]["steps"] == 1
    # What is in the way of another model is not taken for that of the run before.
    (finished / "adapter_config.json").write_text("{}")
    assert train("recipe.yaml", "--overwrite") == 2
    assert "holds adapter_config.json, which no run" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_no_folder(finished):
    shutil.rmtree(finished)
    assert train("recipe.yaml", "data.path=nope.jsonl") == 2
    assert not finished.exists()


def test_the_folder_of_the_model_is_not_written_to(finished, capsys):
    assert train("recipe.yaml", "model.name_or_path=out", "--overwrite") == 2
    assert "holds the model that is to be trained" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(finished, capsys):
    with run_folder.locked(load_recipe("recipe.yaml"), overwrite=True):
        for option in ("--overwrite", "--resume"):
            assert train("recipe.yaml", option, "training.max_steps=8") == 2
            assert "a run is at work in out" in capsys.readouterr().err


def test_the_lock_ends_with_the_process(finished):
    code = (
        "import filelock, time; lock = filelock.FileLock('out/.lock'); lock.acquire(); "
        "print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="a run is at work"):
            run_folder.locked(load_recipe("recipe.yaml"), overwrite=True).__enter__()
        holder.kill()
    with run_folder.locked(load_recipe("recipe.yaml"), overwrite=True):
        pass


def test_home_is_found_once(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["training.output_dir=~/x", "data.path=~/d.jsonl", "model.name_or_path=~/m"]
    recipe = load_recipe(original / "recipe.yaml", overrides)
    assert recipe.output_dir == tmp_path / "x" == Path(recipe.training_arguments().output_dir)
    assert recipe.data.path == str(tmp_path / "d.jsonl")
    assert recipe.model.name_or_path == str(tmp_path / "m")
