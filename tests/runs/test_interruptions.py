"""Signals, a kill, a full disk: whatever ends a run early leaves the checkpoint before."""

import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from run_folders import at_step, state, train
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from liger_trainer.runs import checkpoints, signals
from liger_trainer.runs import run as runs


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


def test_a_signal_while_the_processes_agree_counts_after_the_next_step(finished, monkeypatch):
    shutil.rmtree(finished)
    agreed = []

    def in_any_process(found, args):
        agreed.append(found)
        press(len(agreed) == 1)
        return found

    monkeypatch.setattr(signals, "in_any_process", in_any_process)
    assert train("recipe.yaml") == 130
    assert agreed == [False, True]
    assert state(finished)["summary"]["steps"] == 2


def test_a_signal_in_the_final_save_ends_after_it(finished, monkeypatch, capsys):
    shutil.rmtree(finished)
    at_step(monkeypatch, "save_model", 1, lambda: press(1))
    assert train("recipe.yaml", "training.max_steps=1", "training.save_strategy=no") == 0
    told = capsys.readouterr()
    assert "Stopping when the model is saved." in told.err
    assert re.search(r"held-out loss +[\d.]+ before, - after", told.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_final_evaluation_keeps_the_model(finished, monkeypatch, capsys, number):
    shutil.rmtree(finished)
    at_step(monkeypatch, "evaluation_loop", 1, lambda: os.kill(os.getpid(), number))
    assert train("recipe.yaml", "training.max_steps=1") == 0
    assert "the trained model is saved" in capsys.readouterr().out
    assert state(finished)["state"] == "finished"
    assert load_file(finished / "model.safetensors")


def evaluated(processes):
    """Interrupt the final evaluation in one of some processes, as a second signal does."""

    def evaluate():
        raise KeyboardInterrupt

    run = object.__new__(runs._Run)
    run.args = SimpleNamespace(world_size=processes, process_index=0)
    run.stop = SimpleNamespace(interrupt_evaluation=lambda args: None)
    run.prepared = SimpleNamespace(eval=[0])
    run.trainer = SimpleNamespace(state=SimpleNamespace(log_history=[]), evaluate=evaluate)
    run._evaluate()


def test_a_second_signal_in_the_final_evaluation(capsys):
    evaluated(processes=1)
    assert "the trained model is saved" in capsys.readouterr().out
    # Each of several processes leaves at its own place, after which they share no collective.
    with pytest.raises(KeyboardInterrupt, match="the trained model is saved"):
        evaluated(processes=2)


def test_a_signal_to_the_process_group_spares_those_that_load_batches():
    def loader():
        wrapped = DataLoader(Groups(), num_workers=1, worker_init_fn=seed, collate_fn=list)
        return SimpleNamespace(base_dataloader=wrapped)  # as accelerate does

    trainer = SimpleNamespace(get_train_dataloader=loader, get_eval_dataloader=loader)
    signals.shield_workers(trainer)
    for make in (trainer.get_train_dataloader, trainer.get_eval_dataloader):
        [[(group, seeded)]] = make().base_dataloader
        assert group != os.getpgrp()
        assert seeded == "0"


def seed(worker):
    os.environ["SEED"] = str(worker)


class Groups(Dataset):
    """One row: the process group in which it is loaded, and what `seed` left there."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return os.getpgrp(), os.environ.get("SEED")


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
