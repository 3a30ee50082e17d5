"""Which launches take a variant of a kernel that an earlier one compiled."""

import pytest
import torch

from liger_trainer.kernels import launch as module
from liger_trainer.kernels.launch import launch


class Kernel:
    """Stands in for a function under `triton.jit`; counts its launches and its variants'."""

    arg_names = ("x", "n", "scale", "flag", "BLOCK")

    def __init__(self, compiles=True):
        self.compiles, self.launches, self.reused = compiles, 0, []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.launches += 1
            return Variant(self) if self.compiles else None

        return run


class Variant:
    packed_metadata = ()

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.reused.append((grid, arguments))


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(module, "_variants", {})


X = torch.zeros(64)


def run(kernel, x=X, n=7, scale=0.5, flag=True, grid=(3,), **constants):
    launch(kernel, grid, x, n, scale, flag, **({"BLOCK": 16, "num_warps": 4} | constants))


def test_the_same_arguments_take_the_same_variant():
    kernel = Kernel()
    run(kernel)
    run(kernel, x=torch.ones(128), scale=0.25)
    assert kernel.launches == 1
    ((grid, (x, *rest)),) = kernel.reused
    assert grid == (3, 1, 1)
    assert x.shape == (128,)
    assert rest == [7, 0.25, True, 16]  # in the order of the signature, without compiler options


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.bfloat16()},
        {"x": X[1:]},  # not aligned
        {"x": torch.zeros(64, device="meta")},
        {"grid": (4,)},
        {"n": 8},
        {"n": 2**40},
        {"flag": 1},
        {"flag": None},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=lambda other: str(next(iter(other))),
)
def test_others_have_one_of_their_own(other):
    kernel = Kernel()
    run(kernel)
    run(kernel, **other)
    run(kernel, **other)
    assert kernel.launches == 2
    assert len(kernel.reused) == 1


def test_kernels_do_not_share_variants():
    first, second = Kernel(), Kernel()
    run(first)
    run(second)
    assert first.launches == second.launches == 1


def test_without_a_compiler_every_launch_is_the_kernels_own():
    kernel = Kernel(compiles=False)
    run(kernel)
    run(kernel)
    assert kernel.launches == 2


def test_variants_of_ever_new_lengths_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "_MAX_VARIANTS", 4)
    kernel = Kernel()
    for n in range(10):
        run(kernel, n=n)
    assert len(module._variants) <= 4
