"""Processes of one group, forked from a server that has imported what takes long.

The tests' own process cannot be forked: it has used OpenMP and autograd, which then hang or raise.
The server (multiprocessing's) only imports `preloaded`, so that whatever it forks starts afresh.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["preloaded"])


def fork(worker: Callable[..., None], *arguments) -> BaseProcess:
    """Start `worker(*arguments)` in a process that belongs to no group."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()  # it finds modules by the environment's path only
    process = forks.Process(target=worker, args=arguments)
    process.start()
    return process


def launch(world: int, worker: Callable[..., None], *arguments) -> list[BaseProcess]:
    """Start `worker(*arguments)` in `world` processes, which find each other by their environment.

    The worker is a module's function, and it and its arguments can be pickled.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    return [fork(_run, rank, world, port, worker, arguments) for rank in range(world)]


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
