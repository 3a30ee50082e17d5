"""Processes of one group, forked from a server that has imported what takes long.

The tests' own process cannot be forked: it has used OpenMP and autograd, which then hang or raise.
The server (multiprocessing's) runs nothing, so that whatever it forks starts afresh.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

forks = multiprocessing.get_context("forkserver")
# What cannot be imported is passed over.
forks.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "peft",
        "matplotlib.pyplot",
        "liger_trainer.runs.run",
        "liger_trainer.trl",
        "trl.trainer.sft_trainer",
    ]
)


def launch(world: int, worker: Callable[..., None], *arguments) -> list[BaseProcess]:
    """Start `worker(*arguments)` in `world` processes, which find each other by their environment.

    The worker is a module's function, and it and its arguments can be pickled.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    processes = [
        forks.Process(target=_run, args=(rank, world, port, worker, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def _run(rank: int, world: int, port: int, worker: Callable[..., None], arguments: tuple) -> None:
    import torch

    gc.freeze()  # every training collects garbage, and would look at all that is imported
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    worker(*arguments)
    sys.stdout.flush()


def start(world: int, worker: Callable[..., None], *arguments) -> None:
    """Run `worker(*arguments)` in `world` processes.

    SystemExit if one of them fails; the others are ended then.
    """
    running = launch(world, worker, *arguments)
    try:
        while waiting := [process for process in running if process.exitcode is None]:
            if any(process.exitcode for process in running):
                break
            waiting[0].join(0.2)
    finally:
        for process in running:
            process.terminate()
            process.join()
    if any(process.exitcode for process in running):
        raise SystemExit(f"exit codes {[process.exitcode for process in running]}")
