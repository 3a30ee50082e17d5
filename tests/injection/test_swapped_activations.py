"""A swapped activation is the plain activation, whatever is done to it and to its result."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from plain_mlp import Mlp
from plain_norm import Norm
from torch import nn
from transformers.activations import ACT2FN, GELUActivation

from liger_trainer import inject, restore
from liger_trainer.injection.rules import gated

pytestmark = pytest.mark.usefixtures("every_size")


class Plain(Mlp):
    def forward(self, x):
        return self.act(self.gate(x)).cos() + self.up(x)


@pytest.fixture
def products(monkeypatch):
    """Counts the fused products."""
    calls = []
    original = gated.Gate.product

    def counting(self, gate, up):
        calls.append(gate.shape)
        return original(self, gate, up)

    monkeypatch.setattr(gated.Gate, "product", counting)
    return calls


def compare(model, plain, *inputs):
    outputs = [each(*inputs) for each in (model, plain)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(o.sum(), [*m.parameters()], allow_unused=True)
             for o, m in zip(outputs, (model, plain), strict=True)]  # fmt: skip
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("second", [Mlp, Plain])
def test_an_activation_that_two_parents_share(second, products):
    activation = nn.SiLU()
    model = nn.Sequential(Mlp(activation), second(activation))
    plain = copy.deepcopy(model)
    report = inject(model)
    assert report.coverage["swiglu"] == ((2, 2) if second is Mlp else (1, 1))
    products.clear()
    compare(model, plain, torch.randn(3, 8))
    assert products
    compare(model, plain, torch.randn(3, 8))
    restore(model)
    assert type(model[0].act) is nn.SiLU


def swapped_activation(activation=None) -> nn.Module:
    model = nn.Sequential(Mlp(activation or nn.SiLU()))
    report = inject(model, {"activation_memory": "keep"})
    assert sum(c.swapped for c in report.coverage.values()) == 1
    return model[0].act


def gate_and_up():
    return torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)


def through_a_view(activated, up):
    activated.view(-1)[:5] = 0.5
    return activated * up


def in_place(activated, up):
    activated.mul_(2)
    return activated * up


def augmented(activated, up):
    activated *= up
    return activated


def hooked(activated, up):
    activated.register_hook(lambda grad: 3 * grad)
    return activated * up


def read_twice(activated, up):
    return activated * up + activated.exp() * up


def of_another_dtype(activated, up):
    return activated * up.half()


def scaled(activated, up):
    return activated * 3.0 * up


@pytest.mark.parametrize(
    "use", [through_a_view, in_place, augmented, hooked, read_twice, of_another_dtype, scaled]
)
def test_whatever_is_done_to_an_activation(use):
    activation = swapped_activation()
    gate, up = gate_and_up()
    results = []
    for function in (activation, F.silu):
        result = use(function(gate), up)
        results.append((result, *torch.autograd.grad(result.sum(), (gate, up))))
    torch.testing.assert_close(*results)


def test_a_gradient_that_is_retained_on_an_activation():
    gate, up = gate_and_up()
    activated = swapped_activation()(gate)
    activated.retain_grad()
    (activated * up).sum().backward()
    torch.testing.assert_close(gate.grad, torch.autograd.grad((F.silu(gate) * up).sum(), gate)[0])


def test_a_gate_that_is_changed_in_place_where_autograd_allows_it():
    activation = swapped_activation()
    gate, up = gate_and_up()
    for context, x in ((torch.no_grad(), gate), (torch.enable_grad(), gate.detach())):
        with context:
            expected = F.silu(x) * up
            activated = activation(x)
            x.add_(1.0)
            torch.testing.assert_close(activated * up, expected)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_an_activation_fire(hook, products):
    activation = swapped_activation()
    seen = []
    getattr(activation, hook)(lambda *_: seen.append(1) and None)
    gate, up = gate_and_up()
    products.clear()
    (activation(gate) * up).sum().backward()
    assert seen
    assert not products


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_activation_alone_in_a_checkpoint(reentrant):
    activation = swapped_activation()
    gate, up = gate_and_up()
    result = torch.utils.checkpoint.checkpoint(activation, gate, use_reentrant=reentrant) * up
    expected = F.silu(gate) * up
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.sum(), (up,), retain_graph=True),
        torch.autograd.grad(expected.sum(), (up,), retain_graph=True),
    ) if not reentrant else None
    result.sum().backward()
    torch.testing.assert_close(gate.grad, torch.autograd.grad(expected.sum(), gate)[0])


def test_an_activation_whose_parameters_change():
    activation = swapped_activation(nn.GELU())
    gate, up = gate_and_up()
    assert type(activation(gate)) is gated.DeferredActivation
    activation.approximate = "tanh"
    assert type(activation(gate)) is torch.Tensor
    torch.testing.assert_close(activation(gate) * up, F.gelu(gate, approximate="tanh") * up)


def test_an_activation_called_by_keyword():
    gate, up = gate_and_up()
    torch.testing.assert_close(swapped_activation()(input=gate) * up, F.silu(gate) * up)


class Noisy(nn.Module):
    def forward(self, x):
        return F.silu(x) + 1e-3 * torch.randn_like(x) if self.training else F.silu(x)


class LeakyInTraining(nn.Module):
    def forward(self, x):
        return F.silu(x) + 0.01 * x if self.training else F.silu(x)


class Guarded(nn.Module):
    def forward(self, x):
        return F.silu(x).nan_to_num()


@pytest.mark.parametrize("activation", [Noisy, LeakyInTraining, Guarded])
def test_activations_that_are_not_always_silu_are_refused(activation):
    model = nn.Sequential(Mlp(activation().eval()))
    assert not any(row.swapped for row in inject(model).rows)


class MySwish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    "activation", [MySwish, nn.SiLU, GELUActivation, lambda: ACT2FN["gelu_pytorch_tanh"]]
)
def test_activations_are_found_by_what_they_compute(activation):
    swapped_activation(activation())


def test_a_module_that_is_looked_into_is_not_touched():
    class Keeps(Mlp):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    model = nn.Sequential(Keeps(nn.SiLU()))
    assert inject(model).coverage["swiglu"] == (1, 1)
    assert not hasattr(model[0], "last")


def test_dropout_after_injection_is_that_of_the_plain_model():
    model = tiny_model("llama")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    inject(model)
    assert torch.equal(torch.get_rng_state(), before)


# --- compiled --------------------------------------------------------------------------------


def test_swapped_modules_compile_to_one_graph_and_notice_changes():
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(8), Norm(8), Mlp(nn.SiLU()), Mlp(nn.GELU()))
    plain = copy.deepcopy(model)
    inject(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(compiled(x), plain(x))
    for each in (model, plain):
        each[1].eps = 0.5
        each[3].act.approximate = "tanh"
    torch.testing.assert_close(compiled(x), plain(x))
