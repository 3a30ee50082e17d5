"""Two processes: the drop-in's losses, metrics and gradient norms are TRL's own, and fused.

One launch for each engine trains by every method, with TRL's trainer and with the drop-in.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = ["SFT", "DPO", "KTO", "ORPO"]
ENGINES = ["DDP", "FSDP2"]


def arguments(method: str) -> dict:
    import trl_parity
    from datasets import Dataset

    questions = [f"{'two plus ' * n}two ?" for n in range(1, 9)]
    if method == "SFT":
        rows = [{"prompt": question, "completion": " is four ."} for question in questions]
    elif method == "KTO":
        rows = [
            {
                "prompt": question,
                "completion": " the mat" if i % 2 else " four .",
                "label": not i % 2,
            }
            for i, question in enumerate(questions)
        ]
    else:
        answers = {"chosen": " four .", "rejected": " the mat"}
        rows = [{"prompt": question, **answers} for question in questions]
    reference = {"ref_model": trl_parity.policy(seed=1)} if method in ("DPO", "KTO") else {}
    return {"model": trl_parity.policy(), "train_dataset": Dataset.from_list(rows), **reference}


def train(engine: str, method: str, folder: Path, flag: bool) -> list[dict]:
    """Return the trainer's log, and add to it how often the head computed all logits."""
    import trl_parity

    from liger_trainer.deferred import logits as deferred

    calls = []
    plain_call = deferred.plain_call
    deferred.plain_call = lambda *args: calls.append(args) or plain_call(*args)
    config = {"gradient_accumulation_steps": 2}
    try:
        built = trl_parity.trainer(method, folder, lambda: arguments(method), config, flag)
        if engine == "FSDP2":
            shard(built)
        built.train()
    finally:
        deferred.plain_call = plain_call
    expected = "DistributedDataParallel" if engine == "DDP" else "FSDP"
    assert expected in type(built.model_wrapped).__name__
    return [*built.state.log_history, {"plain head calls": len(calls)}]


def shard(trainer) -> None:
    """Shard the model as accelerate does on GPUs; on CPUs it wraps it in DDP instead."""
    from torch.distributed.fsdp import fully_shard

    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    trainer.accelerator.prepare_model = lambda model, **options: model


@pytest.fixture(scope="module", params=ENGINES)
def logs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, request.param, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "logs.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_two_processes(method, logs):
    *expected, _ = logs[f"{method} False"]
    *got, fused = logs[f"{method} True"]
    assert len(got) == len(expected) >= 2
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert fused == {"plain head calls": 0}


def main(engine: str, folder: Path) -> None:
    """What each process runs; the first writes the logs."""
    from liger_trainer.runs.engine import leave_group

    logs = {
        f"{method} {flag}": train(engine, method, folder, flag)
        for method in METHODS
        for flag in (False, True)
    }
    if torch.distributed.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(logs))
    torch.distributed.barrier()  # one that leaves early takes the other's connection with it
    leave_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    import torch

    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
