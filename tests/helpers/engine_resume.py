"""Checkpoints under engines: python tests/helpers/engine_resume.py --json F --engines NAME ...

A run on two processes is killed: the second one, in the middle of its fourth step. It is resumed
from its checkpoint of step 2, on two processes and on others that see the same eight examples a
step, and is to end as a run that was never interrupted: the same losses of the steps that follow,
the same weights, in a saved model with the plain model's names. AdamW, so that its state counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path

import accelerated
import engine_trainers
import torch
import torch.distributed as dist
import trl_parity
from datasets import Dataset
from engine_trainers import FSDP2, zero
from engines import as_table, whole_weights
from processes import start
from safetensors.torch import load_file

STEPS, EXAMPLES, MICRO = 4, 8, 2
SHARDED = {"fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}}
FULL = {"fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": "FULL_STATE_DICT"}}
ENGINES = {
    "DDP": {"use_cpu": True},
    "FSDP2, full state": FSDP2 | FULL,
    "FSDP2, sharded state": FSDP2 | SHARDED,
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3, stage3_gather_16bit_weights_on_model_save=True),
}
WORLDS = (2, 1, 4)  # that resume


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(STEPS * EXAMPLES):
        ids = torch.randint(3, 320, (12,), generator=generator)
        labels = ids.masked_fill(torch.arange(12) < 1 + i % 8, -100)
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(found)


def make_trainer(engine: str, folder: Path):
    from transformers import TrainingArguments

    from liger_trainer import LigerTrainer

    options = trl_parity.COMMON | {
        "use_cpu": False, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": STEPS,
        "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": EXAMPLES // MICRO // dist.get_world_size(),
        "use_liger_kernel": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **options | ENGINES[engine])
    return LigerTrainer(trl_parity.policy(), arguments, train_dataset=rows())


def train(engine: str, folder: str, resume: bool, kill: bool, out: str) -> None:
    """What each process runs; the first writes what the run left."""
    with engine_trainers.told(out):
        _train(engine, folder, resume, kill, out)


def _train(engine: str, folder: str, resume: bool, kill: bool, out: str) -> None:
    if engine != "DDP":
        accelerated.over_gloo()
    dist.init_process_group("gloo")
    trainer = make_trainer(engine, Path(folder))
    if kill:
        step = trainer.training_step

        def deadly(*args, **kwargs):
            if trainer.state.global_step == STEPS - 1 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        trainer.training_step = deadly
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2") if resume else None)
    weights = whole_weights(trainer.model_wrapped, trainer.accelerator.unwrap_model(trainer.model))
    if trainer.is_fsdp_enabled:  # sharded, Trainer saves no model, and says nothing
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(out + "-model")
    if dist.get_rank() == 0:
        log = {
            e["step"]: [e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "loss" in e
        }
        torch.save({"log": log, "weights": weights}, out)
    dist.barrier()
    dist.destroy_process_group()


def run(engine: str, world: int, folder: Path, out: Path, resume=False, kill=False) -> str:
    """Return an empty string, or what went wrong."""
    with contextlib.suppress(SystemExit):
        start(world, train, engine, str(folder), resume, kill, str(out))
    return "" if out.exists() else engine_trainers.failure(out)


def differences(got: Path, expected: Path) -> str:
    ours, theirs = torch.load(got), torch.load(expected)
    for step in range(3, STEPS + 1):
        if ours["log"][step] != theirs["log"][step] and not torch.allclose(
            *map(torch.tensor, (ours["log"][step], theirs["log"][step])), rtol=1e-5
        ):
            return f"step {step}: {ours['log'][step]} for {theirs['log'][step]}"
    saved = load_file(Path(f"{got}-model") / "model.safetensors")
    plain = trl_parity.policy().state_dict()
    if saved.keys() != plain.keys():
        return f"names: {sorted(saved.keys() ^ plain.keys())[:2]}"
    for name, weight in theirs["weights"].items():
        for found in (ours["weights"][name], saved[name]):
            if (found - weight).norm() > 1e-5 * weight.norm():
                return f"{name} is off by {(found - weight).norm() / weight.norm():.1e}"
    return ""


def cells_of(engine: str, worlds, folder: Path) -> dict[str, str]:
    whole = folder / "whole.pt"
    failed = run(engine, 2, folder / "whole", whole)
    if failed:
        return {"2 -> 2": f"the run itself: {failed}"}
    killed = run(engine, 2, folder / "killed", folder / "killed.pt", kill=True)
    assert killed, "it was to be killed"
    found = {}
    for world in worlds:
        out = folder / f"resumed-{world}.pt"
        failed = run(engine, world, folder / "killed", out, resume=True)
        wrong = failed or differences(out, whole)
        found[f"2 -> {world}"] = wrong or "="
    return found


def matrix(engines: list[str], worlds, out: str) -> dict[str, dict[str, str]]:
    cells = {}
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            cells[engine] = cells_of(engine, worlds, Path(folder))
        print(engine, cells[engine], flush=True)
    Path(out).write_text(json.dumps(cells, indent=1))
    return cells


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--processes", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--json", default="engine_resume.json")
    chosen = parser.parse_args()
    print(as_table(matrix(chosen.engines, chosen.processes, chosen.json)))
