"""`activation_memory` as a budget: how many layers are kept, and that they fit."""

import pytest
import torch
from families import tiny_model
from simulated_device import Simulated
from torch import nn

from liger_trainer import inject
from liger_trainer.injection.memory_budget import GIB, Budget


def simulated(asked, layers=32, **device):
    device = Simulated(**device)
    return Budget(asked, [nn.Identity()] * layers, device), device


def test_the_first_step_keeps_one_layer_and_the_next_as_many_as_fit():
    budget, device = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    assert device.step(budget, 1024) == (1, 2 * GIB + GIB + GIB // 4)
    kept, taken = device.step(budget, 1024)
    assert kept == 28  # (10 - 2 - 1) GiB / 256 MiB
    assert taken <= 10 * GIB


def test_states_that_the_first_optimizer_step_makes_are_counted_once():
    budget, device = simulated(12, base=2 * GIB, rest=1 << 20, cost=1 << 18, states=2 * GIB)
    kept = [device.step(budget, 1024)[0] for _ in range(4)]
    assert kept[0] == 1
    assert kept[-1] == 28  # (12 - 4 - 1) GiB / 256 MiB
    assert kept[1] <= kept[-1]


@pytest.mark.parametrize("seed", range(20))
def test_no_step_takes_more_than_the_budget(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    rest, cost = number(1 << 18, 1 << 21), number(1 << 16, 1 << 19)
    base, states = number(GIB // 8, 4 * GIB), number(0, 2 * GIB)
    least = base + states + rest * 4096 + cost * 4096
    budget, device = simulated(
        2 * least / GIB, base=base, rest=rest, cost=cost, states=states, layers=24
    )
    for _ in range(12):
        kept, taken = device.step(budget, number(256, 4096))
        assert taken <= 2 * least
        assert 0 <= kept <= 24


def test_all_layers_are_kept_where_they_fit():
    budget, device = simulated("auto", base=GIB, rest=1 << 18, cost=1 << 16, size=80 * GIB)
    device.step(budget, 4096)
    assert device.step(budget, 4096)[0] == 32
    assert "0 of 32 layers checkpointed" in str(budget)
    assert "auto (80.0 GiB)" in str(budget)


def test_a_budget_that_cannot_be_met_names_what_is_in_use():
    budget, device = simulated(2, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    device.step(budget, 1024)
    assert device.step(budget, 1024)[0] == 0
    device.now = 3 * GIB  # after the forward
    with pytest.raises(
        ValueError, match=r"2 GiB is less than a step takes.*leaves 3\.0 GiB in use"
    ):
        budget.check(is_first=True)
    budget.check(is_first=False)  # a longer batch later on is no reason to end a run


def test_running_out_lowers_the_budget():
    budget, device = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    device.step(budget, 1024)
    assert device.step(budget, 1024)[0] == 28
    device.most = 6 * GIB  # that was all
    assert budget.lower() == 10  # (0.95 * 6 - 2 - 1) GiB / 256 MiB
    assert device.released == 1
    assert device.step(budget, 1024)[0] == 10
    assert "lowered 1 times" in str(budget)


def test_running_out_before_anything_was_measured_is_not_tried_again():
    budget, _ = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    assert budget.choose(1024) == 1
    assert budget.lower() == 0  # before the last layer, which would have been measured
    assert budget.choose(1024) == 0
    assert budget.choose(4096) == 0
    assert budget.choose(512) == 1  # fewer tokens may show what a layer takes


@pytest.mark.parametrize("value", [0, -1, True, "8GiB", float("nan"), float("inf"), None])
def test_values_that_are_no_budget(value):
    with pytest.raises(ValueError, match="positive number of GiB"):
        inject(tiny_model("llama"), {"activation_memory": value})
