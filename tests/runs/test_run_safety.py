"""Nothing of a run is lost: whatever interrupts it, whatever another one wants of its folder."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import Trainer

from liger_trainer import cli
from liger_trainer.runs import checkpoints, html
from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.recipe import load_recipe

SECRET = "hf_0123456789abcdef"


def train(path, *arguments):
    return cli.main(["train", str(path), *arguments])


def state(folder):
    return json.loads((folder / "run.json").read_text())


def contents(folder):
    """Every file with its bytes, but for the lock."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a recipe, and in `out` its run of six steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("original")
    values = tiny.recipe_values(folder, save_strategy="steps", save_steps=2)
    values["training"]["lr_scheduler_type"] = "constant"
    values["training"]["output_dir"] = "out"
    values["model"]["token"] = SECRET
    path = tiny.write_recipe(folder, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(path) == 0
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They would take as long as the runs."""
    monkeypatch.setattr(html, "plots", lambda log: [])


@pytest.fixture
def finished(original, tmp_path, monkeypatch):
    """A copy of the run, moved to another folder, as the working folder."""
    shutil.copytree(original / "out", tmp_path / "out")
    shutil.copy(original / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def at_step(monkeypatch, name, step, action):
    """Makes a method of Trainer call `action` first, when it is called after `step` steps."""
    plain = getattr(Trainer, name)

    def method(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, name, method)


# The folder


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
    with run_folder.held(load_recipe("recipe.yaml"), overwrite=True):
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
            run_folder.held(load_recipe("recipe.yaml"), overwrite=True).__enter__()
        holder.kill()
    with run_folder.held(load_recipe("recipe.yaml"), overwrite=True):
        pass


def test_home_is_found_once(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["training.output_dir=~/x", "data.path=~/d.jsonl", "model.name_or_path=~/m"]
    recipe = load_recipe(original / "recipe.yaml", overrides)
    assert recipe.output_dir == tmp_path / "x" == Path(recipe.training_arguments().output_dir)
    assert recipe.data.path == str(tmp_path / "d.jsonl")
    assert recipe.model.name_or_path == str(tmp_path / "m")


# Checkpoints


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


# Interruptions


def press(times):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_waits_for_a_save(finished, monkeypatch, capsys):
    shutil.rmtree(finished)
    at_step(monkeypatch, "_save_optimizer_and_scheduler", 2, lambda: press(2))
    assert train("recipe.yaml") == 130
    assert "Saving; once more" in capsys.readouterr().err
    checkpoint, passed = checkpoints.newest(finished, state(finished)["id"])
    # The first signal came while step 2 was saved, so that one more step was made and saved.
    assert checkpoint.name == "checkpoint-3"
    assert passed == []


def test_a_third_signal_ends_a_save_and_tells_what_is_left(finished, monkeypatch, capsys):
    shutil.rmtree(finished)
    at_step(monkeypatch, "_save_optimizer_and_scheduler", 4, lambda: press(3))
    assert train("recipe.yaml") == 130
    assert "out/checkpoint-2 is complete. Continue with:" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_final_evaluation_keeps_the_model(finished, monkeypatch, capsys, number):
    shutil.rmtree(finished)
    at_step(monkeypatch, "evaluation_loop", 1, lambda: os.kill(os.getpid(), number))
    assert train("recipe.yaml", "training.max_steps=1") == 0
    assert "the trained model is saved" in capsys.readouterr().out
    assert state(finished)["state"] == "finished"
    assert load_file(finished / "model.safetensors")


def test_a_kill_during_a_save_leaves_the_checkpoint_before(finished):
    shutil.rmtree(finished)
    code = (
        "import os, signal, sys; from transformers import Trainer\n"
        "def save(self, *_):\n"
        "    if self.state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "plain = Trainer._save_scaler; Trainer._save_scaler = save\n"
        "from liger_trainer import cli; cli.main(['train', 'recipe.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    found, passed = checkpoints.newest(finished, state(finished)["id"])
    assert found.name == "checkpoint-2"
    assert passed == ["checkpoint-4 is left aside: it was not saved to the end"]
    assert checkpoints.owner(finished / "checkpoint-4") == state(finished)["id"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk with room for one checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_in_one_line_and_loses_no_checkpoint(finished, small_disk, capsys):
    assert train("recipe.yaml", f"training.output_dir={small_disk}/run") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "checkpoint-4 could not be saved" in error
    assert "checkpoint-2 is complete: continue with --resume" in error
    assert not (small_disk / "run" / "checkpoint-4").exists()


# What comes out


def test_weights_that_became_nan_are_told_and_not_saved(finished, capsys):
    shutil.rmtree(finished)
    assert train("recipe.yaml", "training.learning_rate=1e38", "training.max_grad_norm=0") == 1
    assert "the weights became NaN or infinite by step" in capsys.readouterr().err
    assert state(finished)["state"] == "diverged"
    assert not (finished / "model.safetensors").exists()
    assert not list(finished.glob("checkpoint-*"))


def test_a_loss_that_was_nan_is_told(finished, monkeypatch, capsys):
    shutil.rmtree(finished)
    plain = Trainer.training_step

    def step(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss

    monkeypatch.setattr(Trainer, "training_step", step)
    assert train("recipe.yaml", "training.max_steps=2", "training.save_strategy=no") == 1
    assert "a loss was NaN or infinite, logged at step 2" in capsys.readouterr().err
    assert load_file(finished / "model.safetensors")


def test_secrets_reach_no_file_and_no_terminal(original, finished, capsys):
    overrides = [f"model.token={SECRET}", "data.name=https://user:pa55word@host/x"]
    assert train("recipe.yaml", "--dry-run", *overrides) == 1
    assert train("recipe.yaml", *overrides, f"training.hub_token={SECRET}") == 2
    assert train("recipe.yaml", *overrides, f"model.token=[{SECRET}]") == 2
    printed = "".join(capsys.readouterr())
    assert "token: '***'" in printed
    written = [(original / "out" / name).read_text() for name in ("run.json", "report.html")]
    for secret in (SECRET, "pa55word"):
        assert not any(secret in text for text in [printed, *written])
    assert SECRET.encode() not in (original / "out" / "training_args.bin").read_bytes()


def test_the_report_tells_when_and_how(original):
    page = (original / "out" / "report.html").read_text()
    assert f"begun {state(original / 'out')['started']}" in page
    assert "liger-trainer train" in page


# Several processes


def test_two_processes_share_a_run_and_one_speaks(finished):
    shutil.rmtree(finished)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "liger_trainer.cli", "train", "recipe.yaml", "training.max_steps=200"]
    command += ["training.save_steps=1000", "training.logging_steps=1", "data.eval_fraction=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        while not (finished / "run.json").exists() and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)  # torchrun passes it on, to each at its own time
        printed = running.stdout.read().decode()
    assert printed.count("Continue with:") == 1, printed
    found = state(finished)
    assert found["state"] == "interrupted"
    assert found["summary"]["steps"] < 200
    assert (found["processes"], found["engine"]) == (2, "MULTI_CPU")
    assert len(found["summary"]["peak_memory_gib_by_process"]) == 2
    checkpoint, _ = checkpoints.newest(finished, found["id"])
    assert checkpoints.step(checkpoint) == found["summary"]["steps"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in checkpoint.iterdir()}
