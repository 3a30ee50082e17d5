"""Trainers under engines: python tests/helpers/engine_trainers.py --json F --cells CP,SFT ...

Each cell trains with the flag off, and with it on, under an engine that accelerate sets up by its
own code, on two or four CPU processes. Log (losses, metrics, gradient norms) and weights are to be
those of the flag off, and the head is never to be called for its plain logits (*fused*, counted).
The column *Trainer* is also compared with one process that has whole rows. Where the drop-in fails,
the cell has its error, and that of the plain trainer or that it *trains*.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerated
import plain_heads
import ring_on_cpu
import torch
import torch.distributed as dist
import trl_parity
from datasets import Dataset
from engines import whole_weights
from processes import start
from torch import nn

LENGTH = 16
COMMON = {"gradient_accumulation_steps": 2, "use_cpu": False}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}


def zero(stage: int, **more) -> dict:
    automatic = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    options = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
    return {"deepspeed": {**automatic, "zero_optimization": options,
                          "zero_allow_untested_optimizer": True}}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """`arguments()` are those of the trainer's config, `alone` those of one process instead."""

    arguments: Callable[[], dict]
    alone: dict = dataclasses.field(default_factory=lambda: {"per_device_train_batch_size": 4})
    load: Callable[[Callable[[], nn.Module]], nn.Module] = lambda make: make()
    by_micro_batch: bool = False  # the mean over micro-batches, not over the step's tokens
    processes: int = 2


def fsdp2_with(**sizes) -> dict:
    from accelerate import ParallelismConfig

    return FSDP2 | {"parallelism_config": ParallelismConfig(**sizes)}


def hybrid() -> dict:
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 2}
    return fsdp2_with(**sizes) | {"per_device_train_batch_size": 1}


def ulysses() -> dict:
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
    parallel = ParallelismConfig(sp_size=2, sp_handler=handler)
    return zero(3) | {"parallelism_config": parallel, "per_device_train_batch_size": 1}


def split(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that `make` returns, split by transformers over two ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        make().save_pretrained(folder[0])
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=config)


ROWS = {
    "FSDP2": Row(lambda: FSDP2),
    "ZeRO-2": Row(lambda: zero(2)),
    "ZeRO-3": Row(lambda: zero(3)),
    "TP": Row(dict, {}, split),
    "CP": Row(lambda: fsdp2_with(cp_size=2), {}),
    "Ulysses": Row(ulysses, {"per_device_train_batch_size": 1}, by_micro_batch=True),
    "FSDP2 x CP": Row(lambda: fsdp2_with(dp_shard_size=2, cp_size=2), processes=4),
    "HSDP": Row(hybrid, processes=4),
}
METHODS = ("Trainer", "SFT", "DPO", "KTO", "ORPO", "GRPO")


def rows_of_ids() -> Dataset:
    """Return rows of two halves; in some rows, only one half has labels."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(8):
        ids = torch.randint(3, 320, (LENGTH,), generator=generator)
        labels = ids.masked_fill(torch.arange(LENGTH) < 1 + 2 * i, -100)
        if i == 3:  # the last label lies where the halves meet
            labels[LENGTH // 2 + 1 :] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(),
                     "position_ids": list(range(LENGTH))})  # fmt: skip
    return Dataset.from_list(rows)


def build(method: str, row: Row, folder: Path, options: dict, flag: bool):
    """The trainer."""
    options = COMMON | options
    if method == "Trainer":
        from transformers import Trainer, TrainingArguments

        from liger_trainer import LigerTrainer

        model = row.load(trl_parity.policy)
        arguments = TrainingArguments(
            output_dir=str(folder), **trl_parity.COMMON | options, use_liger_kernel=flag
        )
        made = (LigerTrainer if flag else Trainer)(model, arguments, train_dataset=rows_of_ids())
        if row.by_micro_batch:
            made.model_accepts_loss_kwargs = False
        return made
    if method == "SFT":
        options |= {"pad_to_multiple_of": 32}  # ranks share rows, of one length
    if method == "GRPO":
        options |= {"num_generations": 4, "max_completion_length": 6}
    if method == "KTO":
        options |= {"per_device_train_batch_size": 2}  # its own demand
    return trl_parity.trainer(method, folder, lambda: arguments_of(method, row), options, flag)


def arguments_of(method: str, row: Row) -> dict:
    questions = [f"{'two plus ' * n}two ?" for n in range(1, 9)]
    pair = {"chosen": " four .", "rejected": " the mat"}
    if method == "SFT":
        rows = [{"prompt": question, "completion": " is four ."} for question in questions]
    elif method == "KTO":
        answers = [" four .", " the mat"] * 4
        rows = [
            {"prompt": question, "completion": answer, "label": answer == " four ."}
            for question, answer in zip(questions, answers, strict=True)
        ]
    else:
        rows = [{"prompt": question, **pair} for question in questions]
    found = {"model": row.load(trl_parity.policy), "train_dataset": Dataset.from_list(rows)}
    if method == "GRPO":
        found["train_dataset"] = Dataset.from_dict({"prompt": questions})
        found["reward_funcs"] = [different_characters]
    if method in ("DPO", "KTO"):
        found["ref_model"] = row.load(lambda: trl_parity.policy(seed=1))
    return found


def different_characters(completions, **_) -> list[float]:
    return [len(set(text)) / max(1, len(text)) for text in completions]


def train(engine: str, method: str, outs: dict[bool, str], alone: bool) -> None:
    """What each process runs, for each flag; the first writes what the run left."""
    accelerated.over_gloo()
    ring_on_cpu.install()
    dist.init_process_group("gloo")
    for flag, out in outs.items():
        accelerated.forget()
        with told(out):
            _train(ROWS[engine], method, flag, alone, out)
    dist.destroy_process_group()


def _train(row: Row, method: str, flag: bool, alone: bool, out: str) -> None:
    options = row.alone if alone else row.arguments()
    if alone:
        row = dataclasses.replace(row, load=Row.load)
    with plain_heads.counted() as calls:
        trainer = build(method, row, Path(out).with_suffix(""), options, flag)
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_weights(trainer.model_wrapped, model)
    if dist.get_rank() == 0:
        log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        torch.save({"log": log, "weights": weights, "calls": calls.call_count}, out)
    dist.barrier()


@contextlib.contextmanager
def told(out: str) -> Iterator[None]:
    """Write an error beside `out`, for `failure`, and end the process."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:160]
        rank = os.environ["RANK"]
        Path(f"{out}.{rank}.error").write_text(f"{type(error).__name__}: {line}")
        if os.environ.get("MATRIX_TRACE"):
            traceback.print_exc()
        raise SystemExit(1) from error


def failure(out: Path) -> str:
    """Return the first error: processes whose neighbor has ended only report that."""
    errors = [path.read_text() for path in sorted(out.parent.glob(f"{out.name}.*.error"))]
    return next((error for error in errors if "gloo" not in error), "killed")


def found_by(engine: str, method: str, folder: Path, flags=(False, True), alone: bool = False):
    """Return what each run left, or its error. One that fails ends the processes of both."""
    name = f"{list(ROWS).index(engine)}-{method}-{alone}"
    outs = {flag: folder / f"{name}-{flag}.pt" for flag in flags}
    left = {flag: str(out) for flag, out in outs.items()}
    while left:
        with contextlib.suppress(SystemExit):
            start(1 if alone else ROWS[engine].processes, train, engine, method, left, alone)
        missing = [flag for flag in left if not outs[flag].exists()]
        left = {flag: left[flag] for flag in missing[1:]}  # the first of them was tried
    return [torch.load(out) if out.exists() else failure(out) for out in outs.values()]


def differences(got: dict, expected: dict) -> str:
    runs = [trl_parity.Run(None, x["log"], [], {}, x["weights"]) for x in (got, expected)]
    try:
        error, what = trl_parity.distance(*runs)
    except AssertionError as other:
        return str(other)
    return "" if error <= 1 else f"{error:.1e} tolerances away: {what}"


def cell(engine: str, method: str, folder: Path) -> str:
    """Return "= and fused", or what is wrong."""
    expected, got = found_by(engine, method, folder)
    if isinstance(got, str):
        plain = expected if isinstance(expected, str) else "trains"
        return f"{got} (plain: {plain})"
    if isinstance(expected, str):
        return f"WRONG: trains, plain fails: {expected}"
    wrong = differences(got, expected)
    if not wrong and method == "Trainer":
        (alone,) = found_by(engine, method, folder, flags=(False,), alone=True)
        wrong = differences(got, alone)
        wrong = wrong and f"one process: {wrong}"
    if wrong:
        return f"WRONG: {wrong}"
    return "=, fused" if not got["calls"] else f"=, {got['calls']} plain head calls"


def matrix(chosen: list[tuple[str, str]], out: str) -> dict[str, dict[str, str]]:
    cells: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, method in chosen:
            if method != "Trainer":
                trl_parity.classes(method, True)  # imported once, not in every process
            found = cell(engine, method, Path(folder))
            cells.setdefault(engine, {})[method] = found
            print(f"{engine} | {method} | {found}", flush=True)
    Path(out).write_text(json.dumps(cells, indent=1))
    return cells


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [f"{engine},{method}" for engine in ROWS for method in METHODS]
    parser.add_argument("--cells", nargs="+", default=every, metavar="ENGINE,METHOD")
    parser.add_argument("--json", default="engine_trainers.json")
    given = parser.parse_args()
    matrix([tuple(cell.split(",")) for cell in given.cells], given.json)
