"""Hooks that an engine puts on every module, also on those that hold nothing to gather."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alias import Alias
from torch import nn

pytest.importorskip("peft")
from lora_models import adapted, count_fused, step

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


class GatheredAgain(torch.autograd.Function):
    """Passes its input on; the module's weights are back before the gradient goes further."""

    @staticmethod
    def forward(ctx, output, gather):
        ctx.gather = gather
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.gather()
        return grad, None


def take_weights_away(model: nn.Module) -> None:
    """Let every module have its weights within its calls and their backward alone, as ZeRO-3."""

    def of(module):
        weights = {p: p.data for p in module.parameters(recurse=False)}

        def gather():
            for p, data in weights.items():
                p.data = data

        def before(module, args):
            gather()

        def after(module, args, output):
            for p in weights:
                p.data = p.data.new_empty(0)
            if isinstance(output, tuple):  # the anchor of a deferred call
                return tuple(GatheredAgain.apply(each, gather) for each in output)
            return GatheredAgain.apply(output, gather)

        before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        after(module, (), torch.zeros(0))

    for module in model.modules():
        if next(module.children(), None) is None:  # those without weights, too
            of(module)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_whose_weights_are_there_within_their_calls_alone(
    dropout, monkeypatch, every_size
):
    model = adapted(target_modules="all-linear", lora_dropout=dropout)
    plain = copy.deepcopy(model)
    report = inject(model)
    results = []
    calls = count_fused(monkeypatch)
    for each in (plain, model):
        take_weights_away(each)
        torch.manual_seed(0)
        results.append(step(each))
    assert calls == ["lora_linear"] * 7
    assert report.coverage["lora"].swapped == 7
    if not dropout:  # whose masks come from seeds of their own
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert results[1].keys() == results[0].keys()
