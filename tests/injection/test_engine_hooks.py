"""Hooks that an engine puts on every module, also on those that hold nothing to gather."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alias import Alias
from torch import nn

from liger_trainer import inject
from liger_trainer.injection.rules import gated, lora

peft = pytest.importorskip("peft")

from lora_models import adapted, assert_trains_alike, count_fused, step  # noqa: E402

ENGINE = "deepspeed.runtime.zero.parameter_offload"


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


@pytest.mark.parametrize(("owner", "fused"), [(ENGINE, True), ("somebody", False)])
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


def test_behind_an_engines_hooks_small_inputs_are_deferred_too(products):
    """Processes whose rows have other lengths must call the same modules in the same order."""
    model = GatedMLP()
    inject(model, strict=True)
    products.clear()
    model(torch.randn(5, 8))
    assert not products
    seen = add_hooks(model, ENGINE)
    model(torch.randn(5, 8))
    assert len(products) == 1
    assert model.act not in seen


def test_the_plain_activation_is_what_others_hooks_see(every_size):
    model = GatedMLP()
    inject(model, strict=True)
    values = []
    model.act.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    model.act.register_forward_hook(lambda module, args, output: values.append(output))
    model(torch.randn(5, 8))
    torch.testing.assert_close(F.silu(values[0]), values[1])


def hook_lora(model: nn.Module) -> list[nn.Module]:
    """Put an engine's hooks on all modules of the LoRA layers; return those they ran for."""
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    return add_hooks(nn.ModuleList(layers), ENGINE)


def test_lora_behind_an_engines_hooks_is_fused_at_every_size(monkeypatch):
    """And its modules are called in PEFT's order: processes must gather the same weights."""
    ours = adapted()
    plain = copy.deepcopy(ours)
    report = inject(ours)
    models = ours, plain
    seen = [hook_lora(model) for model in models]
    fused = count_fused(monkeypatch)
    assert_trains_alike(ours, plain)
    assert sorted(fused) == ["add_adapters"] * 3 + ["lora_linear"] * 4  # 3: x has no gradient
    assert not [row for row in report.refused if row.rule == "lora"]
    orders = []
    for model, called in zip(models, seen, strict=True):
        called.clear()
        step(model)
        names = {module: name for name, module in model.named_modules()}
        orders.append([names[module] for module in called if type(module) is nn.Linear])
    assert len(orders[0]) == 21
    assert orders[0] == orders[1]
    assert not any("forward" in vars(module) for module in ours.modules())


def test_an_engines_hooks_on_linear_layers_alone_may_depend_on_what_those_compute(
    monkeypatch, every_size
):
    """Those of tensor parallelism add up what the parts of a split layer return."""
    ours = adapted()

    def unchanged(module, args):
        return None

    def doubled(module, args, output):
        return 2 * output

    unchanged.__module__ = doubled.__module__ = "torch.distributed.tensor.parallel"
    for name, module in ours.named_modules():
        if type(module) is nn.Linear and "lm_head" not in name:
            module.register_forward_pre_hook(unchanged)
            module.register_forward_hook(doubled)
    plain = copy.deepcopy(ours)
    report = inject(ours)
    fused = count_fused(monkeypatch)
    assert_trains_alike(ours, plain)
    assert not fused
    reasons = {row.reason for row in report.refused if row.rule == "lora"}
    assert reasons == {"hooks on the adapter"}


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_beside_an_engines_hooks_anybody_elses_see_what_they_expect(part, monkeypatch):
    ours = adapted()
    plain = copy.deepcopy(ours)
    inject(ours)
    shapes = []
    for model in (ours, plain):
        hook_lora(model)
        found = getattr(model.base_model.model.model.layers[0].mlp.down_proj, part)
        found = found["default"] if isinstance(found, nn.ModuleDict) else found
        found.register_forward_hook(lambda m, args, out: shapes.append((args[0].shape, out.shape)))
    fused = count_fused(monkeypatch)
    step(ours)
    assert len(fused) == 6
    step(plain)
    assert shapes[0] == shapes[1]


def test_a_failing_call_leaves_no_forward_behind(monkeypatch):
    ours = adapted()
    inject(ours)
    hook_lora(ours)

    def fail(*args):
        raise FloatingPointError

    monkeypatch.setattr(lora, "lora_linear", fail)
    with pytest.raises(FloatingPointError):
        step(ours)
    assert not any("forward" in vars(module) for module in ours.modules())


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

        before.__module__ = after.__module__ = ENGINE
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
    assert len(calls) == 7
    assert report.coverage["lora"].swapped == 7
    if not dropout:  # whose masks come from seeds of their own
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert results[1].keys() == results[0].keys()
