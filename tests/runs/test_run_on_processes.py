"""A run on two processes whose state is sharded; tests/helpers/engine_cli.py is what they run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import engine_cli
import processes
import pytest
import tiny
import torch
from run_folders import state
from safetensors.torch import load_file

from liger_trainer.runs import checkpoints
from liger_trainer.runs.build import check_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def told(folder):
    return engine_cli.attempts(folder)


def test_a_killed_run_goes_on_to_the_model_of_one_that_was_not(folder, told):
    assert told["killed"][0].endswith("-9]")  # SIGKILL; the other is ended, or ends by itself
    assert told["resumed"][0] == told["whole"][0] == "finished"
    expected, got = (
        load_file(folder / name / "model.safetensors") for name in ("whole", "resumed")
    )
    assert got.keys() == expected.keys() == tiny.model().state_dict().keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    log = json.loads((folder / "resumed/checkpoint-4/trainer_state.json").read_text())[
        "log_history"
    ]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


def test_rows_of_any_length_are_shared(folder, told):
    assert told["shared"][0] == "finished"
    assert json.loads((folder / "out/run.json").read_text())["engine"].endswith("cp_size 2")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("one process", "had 2 processes, this one has 1, which would see other batches"),
        ("packed", "data.packing: processes that share a row"),
        ("full state", "was FSDP, SHARDED_STATE_DICT, this one is FSDP, FULL_STATE_DICT"),
        ("other rows", "data: the processes read different rows; give every machine the same"),
    ],
)
def test_what_could_not_go_on_is_refused(told, attempt, message):
    code, sentence = told[attempt]
    assert code.startswith("exit codes [2")
    assert sentence.count(message) == 1


def test_processes_do_not_choose_their_batches_alone():
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        check_batches(SimpleNamespace(world_size=2, auto_find_batch_size=True))


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


def on_two_machines(folders, *words):
    """Train with a process on each of two machines, in its folder; return both codes and what was
    printed."""
    out = folders[0] / "told"
    words = ["recipe.yaml", "training.save_on_each_node=true", *words]
    running = processes.launch(2, engine_cli.train_on_machine, folders, words, str(out))
    try:
        for process in running:
            process.join(200)
    finally:
        for process in running:
            process.kill()
    printed = "".join(Path(f"{out}.{rank}").read_text() for rank in range(2))
    return [process.exitcode for process in running], printed


def test_machines_with_a_disk_each_save_their_checkpoints(finished, tmp_path_factory):
    shutil.rmtree(finished)
    first, second = finished.parent, tmp_path_factory.mktemp("second")
    shutil.copy(first / "recipe.yaml", second)
    codes, printed = on_two_machines([first, second], "training.max_steps=2")
    assert codes == [0, 0], printed
    for folder in (first, second):
        assert not checkpoints.flaw(folder / "out/checkpoint-2", state(finished)["id"])
    # The trained model is in the run's folder, that of the first process.
    assert {p.name for p in (second / "out").iterdir()} == {"checkpoint-2"}
    shutil.rmtree(second / "out")
    codes, printed = on_two_machines([first, second], "training.max_steps=4", "--resume")
    assert all(codes)
    assert "--resume: not every machine has out/checkpoint-2" in printed


def test_machines_that_share_a_disk_do_not_all_save_there(finished):
    shutil.rmtree(finished)
    codes, printed = on_two_machines([finished.parent] * 2)
    assert all(codes)
    assert "training.save_on_each_node: the machines share out" in printed
    assert not finished.exists()
