"""What the engine of a run, which accelerate sets up, means for its checkpoints and its model, and
how its processes agree."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator


def engine_of(accelerator: Accelerator) -> str:
    """Return how the processes share the work, as far as a run that is resumed must do the same."""
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
    """Let the trainer save a model as one: of a sharded state it would save nothing, silently."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")


def in_any_process(found: bool, args) -> bool:
    """Return whether any process of the run has found something; all have to ask."""
    if args.world_size == 1:
        return found
    flag = torch.tensor(float(found), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def leave_group() -> None:
    """Leave the process group, where there is one, after which the process may end.

    A thread of gloo holds the tensors of the last collective for a moment after it is done, and
    needs the interpreter to let go of them. If that shuts down first, it ends the thread within a
    destructor, and the process aborts (SIGABRT).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    uses_gloo = "gloo" in torch.distributed.get_backend_config()
    torch.distributed.destroy_process_group()
    if uses_gloo:
        time.sleep(0.2)
