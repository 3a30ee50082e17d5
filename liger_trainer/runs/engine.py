"""The engine of a run (set up by accelerate): its name, how to save its model, and agreement
between its processes."""

from __future__ import annotations

import os
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def engine_of(accelerator: Accelerator) -> str:
    """Return how the processes share the work, which must be the same when a run is resumed."""
    found = [accelerator.distributed_type.value]
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        found.append(f"ZeRO-{deepspeed.zero_stage}")
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        found.append(str(fsdp.state_dict_type).rpartition(".")[2])
    parallel = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallel, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    return ", ".join([*found, *(f"{name} {size}" for name, size in sizes.items() if size > 1)])


def save_whole_model(accelerator: Accelerator) -> None:
    """Make the trainer gather and save a whole model; of a sharded state it silently saves none."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")


def is_first_on_machine() -> bool:
    """Return whether this process is the one of its machine that prints what all would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_any_process(found: bool, args) -> bool:
    """Return whether `found` is True in any process of the run; all processes must call this."""
    if args.world_size == 1:
        return found
    flag = torch.tensor(float(found), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def is_same_in_all_processes(value: object, args) -> bool:
    """Return whether `value` is the same in all processes of the run, which must all call this."""
    return len(set(gather_object([value]))) == 1 if args.world_size > 1 else True


def leave_group(*, failed: bool = False) -> None:
    """Leave the process group, if there is one, so that the process can exit.

    After a failure, NCCL would wait for collectives that the other processes never join; there the
    group ends with the process.

    A gloo thread holds the tensors of the last collective for a moment after it has finished, and
    needs the interpreter to release them. If the interpreter shuts down first, it ends the thread
    inside a destructor, and the process aborts (SIGABRT).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    backends = torch.distributed.get_backend_config()
    if failed and "nccl" in backends:
        return
    torch.distributed.destroy_process_group()
    if "gloo" in backends:
        time.sleep(0.2)
