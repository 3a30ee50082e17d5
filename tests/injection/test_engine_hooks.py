"""Hooks that an engine puts on every module, also on those that hold nothing to gather."""

import pytest
import torch
import torch.nn.functional as F
from alias import Alias
from torch import nn

from liger_trainer import inject
from liger_trainer.injection.rules import gated


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def add_hooks(model: nn.Module, owner: str) -> list[nn.Module]:
    """Put hooks of a library of that name on all modules; return those they ran for."""
    seen = []

    def before(module, args):
        seen.append(module)
        return tuple(map(Alias.apply, args))

    def after(module, args, output):
        return Alias.apply(output)

    for hook in (before, after):
        hook.__module__ = owner
    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return seen


@pytest.fixture
def products(monkeypatch):
    """Counts the fused products."""
    calls = []
    plain = gated.Gate.product
    monkeypatch.setattr(gated.Gate, "product", lambda *args: calls.append(1) or plain(*args))
    return calls


@pytest.mark.parametrize(
    ("owner", "fused"), [("deepspeed.runtime.zero.parameter_offload", True), ("somebody", False)]
)
def test_hooks_on_every_module(owner, fused, products, every_size):
    torch.manual_seed(0)
    model = GatedMLP()
    x = torch.randn(5, 8)
    expected = model(x)
    grads = torch.autograd.grad(expected.pow(2).sum(), [*model.parameters()])
    report = inject(model, strict=True)
    products.clear()
    seen = add_hooks(model, owner)
    got = model(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.pow(2).sum(), [*model.parameters()]), grads)
    assert {model.gate, model.up, model.down} <= set(seen)
    assert (model.act in seen) == (not fused)
    assert len(products) == fused
    assert bool(report.refused) == (not fused)


def test_the_plain_activation_is_what_others_hooks_see(every_size):
    model = GatedMLP()
    inject(model, strict=True)
    values = []
    model.act.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    model.act.register_forward_hook(lambda module, args, output: values.append(output))
    model(torch.randn(5, 8))
    torch.testing.assert_close(F.silu(values[0]), values[1])
