"""Fixtures: the device of a test, the Triton interpreter on CPU, poisoned allocations."""

import gc
import os
from contextvars import ContextVar

import torch
import torch.utils._device

if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import pytest
from hypothesis import settings

from liger_trainer.kernels import runtime

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.repair()
workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if workers and "OMP_NUM_THREADS" not in os.environ:
    threads = max(1, (os.cpu_count() or 2) // int(workers))
    torch.set_num_threads(threads)
    # In processes that tests start: more threads than cores wait for each other, and busily.
    os.environ["OMP_NUM_THREADS"] = str(threads)


# The same examples at every run; `--hypothesis-profile=thorough` looks for new ones.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Exempt what is there before a file's tests from garbage collection, which every training
    runs: all modules, and what compilers keep, would take half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a test: the CPU, and CUDA under `pytest -m gpu`."""
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def every_size(monkeypatch):
    """Fuse small inputs, too, in every thread: autograd's threads recompute checkpoints."""
    monkeypatch.setattr(runtime, "_every_size", ContextVar("every_size", default=True))


@pytest.fixture
def poisoned(monkeypatch):
    """Fill fresh allocations with NaN, so that elements that a kernel does not write show."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned_make

    # torch.device("meta") looks constructors up in a cache: fill it with the real ones first.
    torch.utils._device._device_constructors()
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def kernel_device(device, poisoned, every_size):
    """Like `device`, but on CPU the Triton kernels run, through the interpreter."""
    if device == "cuda":
        yield device
    else:
        with runtime.interpreted():
            yield device


@pytest.fixture(params=["torch", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, poisoned):
    """The device, once for each path: plain torch, and the Triton kernels."""
    torch.manual_seed(0)
    if request.param == "interpreted":
        with runtime.interpreted():
            yield "cpu"
    else:
        yield "cpu" if request.param == "torch" else "cuda"
