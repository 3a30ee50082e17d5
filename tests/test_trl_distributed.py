"""Two processes, data parallel: the drop-in's losses, metrics and gradient norms are TRL's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = ["SFT", "DPO"]


def train(method: str, folder: Path, flag: bool) -> None:
    """What each process runs; the first writes the trainer's log."""
    import trl_parity
    from datasets import Dataset

    questions = [f"{'two plus ' * n}two ?" for n in range(1, 9)]
    if method == "SFT":
        rows = [{"prompt": question, "completion": " is four ."} for question in questions]
    else:
        answers = {"chosen": " four .", "rejected": " the mat"}
        rows = [{"prompt": question, **answers} for question in questions]
    reference = {"ref_model": trl_parity.policy(seed=1)} if method == "DPO" else {}

    def build():
        data = Dataset.from_list(rows)
        return {"model": trl_parity.policy(), "train_dataset": data, **reference}

    found = trl_parity.run(method, folder, build, {"gradient_accumulation_steps": 2}, flag)
    assert type(found.trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if found.trainer.is_world_process_zero():
        (folder / f"{flag}.json").write_text(json.dumps(found.log))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes(method, tmp_path):
    logs = []
    for flag in (False, True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", __file__, method, str(tmp_path), str(int(flag))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        logs.append(json.loads((tmp_path / f"{flag}.json").read_text()))
    expected, got = logs
    assert len(got) == len(expected) >= 2
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), bool(int(sys.argv[3])))
    torch.distributed.barrier()  # one that leaves early takes the other's connection with it
    torch.distributed.destroy_process_group()
