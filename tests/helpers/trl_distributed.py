"""Training on two processes under an engine, with TRL's trainers and with the drop-ins."""

from __future__ import annotations

import json
from pathlib import Path

import plain_heads
import torch.distributed as dist
import trl_parity
from datasets import Dataset
from torch.distributed.fsdp import fully_shard

from liger_trainer.runs.engine import leave_group

METHODS = ["SFT", "DPO", "KTO", "ORPO"]
ENGINES = ["DDP", "FSDP2"]


def arguments(method: str) -> dict:
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
    config = {"gradient_accumulation_steps": 2}
    with plain_heads.counted() as calls:
        built = trl_parity.trainer(method, folder, lambda: arguments(method), config, flag)
        if engine == "FSDP2":
            shard(built)
        built.train()
    if flag:
        assert not built.injection_report.refused, built.injection_report
    expected = "DistributedDataParallel" if engine == "DDP" else "FSDP"
    assert expected in type(built.model_wrapped).__name__
    return [*built.state.log_history, {"plain head calls": calls.call_count}]


def shard(trainer) -> None:
    """Shard the model as accelerate does on GPUs; on CPUs it wraps it in DDP instead."""
    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    trainer.accelerator.prepare_model = lambda model, **options: model


def worker(engine: str, out: str) -> None:
    """What each process runs; the first writes the logs."""
    logs = {
        f"{method} {flag}": train(engine, method, Path(out).parent, flag)
        for method in METHODS
        for flag in (False, True)
    }
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(logs))
    dist.barrier()  # one that leaves early takes the other's connection with it
    leave_group()
