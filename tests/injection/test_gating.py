"""Which activations are gated: found out at the injection, or when the model runs."""

import copy

import pytest
import torch
from plain_mlp import Mlp
from torch import nn
from transformers.activations import ACT2FN

from liger_trainer import inject
from liger_trainer.injection.rules import gated
from liger_trainer.report import Status

pytestmark = pytest.mark.usefixtures("every_size")


def row_of(report):
    (row,) = [row for row in report.rows if row.rule == "geglu"]
    return row


def assert_equal_steps(model, plain, *inputs):
    steps = []
    for each in (model, plain):
        loss = each(*inputs).square().sum()
        steps.append((loss, *torch.autograd.grad(loss, [*each.parameters()], allow_unused=True)))
    torch.testing.assert_close(*steps)


class NotGated(Mlp):
    """As Bloom's MLP: it needs a residual."""

    def forward(self, x, residual):
        return self.up(self.act(self.gate(x))) + residual


class Merged(Mlp):
    """As the merger of a vision tower: it takes rows of another width than its matrices have."""

    def __init__(self, activation):
        super().__init__(activation)
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        return self.up(self.act(self.gate(self.norm(x).view(-1, 8))))


class Routed(Mlp):
    """As experts: whether it is gated cannot be found out by running it on one tensor."""

    gated = True

    def forward(self, x, rows):
        picked = x[rows[:, 0].long().tolist()]
        activated = self.act(self.gate(picked))
        return activated * self.up(picked) if self.gated else self.up(activated)


class Recurrent(Mlp):
    """As RecurrentGemma's block: given a tensor for its positions, it makes another shape."""

    def forward(self, x, positions):
        return self.act(self.gate(x)) * torch.where(positions[..., None] == 0, 0.5, self.up(x))


class PlainRouted(Routed):
    gated = False


@pytest.mark.parametrize("kind", [NotGated, Merged])
def test_an_activation_without_a_gate_is_none_of_the_rules_business(kind):
    model = nn.Sequential(kind(nn.GELU()))
    report = inject(model)
    assert row_of(report).status is Status.NOT_APPLICABLE
    assert row_of(report).reason == "GELU has no gate"
    assert type(model[0].act) is nn.GELU


def test_what_is_not_known_to_be_gated_shows_when_it_runs(caplog):
    rows = torch.zeros(3, 1)
    for kind, status in ((Routed, Status.SWAPPED), (PlainRouted, Status.NOT_APPLICABLE)):
        model = nn.Sequential(kind(nn.GELU()))
        plain = copy.deepcopy(model)
        report = inject(model)
        assert row_of(report).reason == "act times its gate, if it has one"
        for _ in range(2):
            assert_equal_steps(model[0], plain[0], torch.randn(3, 8), rows)
        assert row_of(report).status is status
    assert row_of(report).reason == "GELU has no gate"
    assert "as in the plain model" not in caplog.text  # nothing was lost


def test_a_gate_that_is_sometimes_read_alone_stays_fused_elsewhere(monkeypatch):
    products = []
    product = gated.Gate.product
    monkeypatch.setattr(gated.Gate, "product", lambda *args: products.append(1) or product(*args))
    model = nn.Sequential(Routed(nn.GELU()))
    plain = copy.deepcopy(model)
    report = inject(model)
    rows = torch.zeros(3, 1)
    for each in (model[0], plain[0]):
        each(torch.randn(3, 8), rows).sum().backward()
        each.gated = False
    assert_equal_steps(model[0], plain[0], torch.randn(3, 8), rows)
    assert row_of(report).reason == "its result is not only multiplied with another projection"
    for each in (model[0], plain[0]):
        each.gated = True
    products.clear()
    assert_equal_steps(model[0], plain[0], torch.randn(3, 8), rows)
    assert products


def test_a_gate_beside_inputs_of_another_kind():
    model = nn.Sequential(Recurrent(nn.GELU()))
    plain = copy.deepcopy(model)
    report = inject(model)
    assert_equal_steps(model[0], plain[0], torch.randn(2, 3, 8), torch.arange(3).expand(2, -1))
    assert row_of(report).status is Status.SWAPPED


@pytest.mark.parametrize("kind", [Routed, PlainRouted])
@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, lambda: ACT2FN["gelu_new"]])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_mlp_of_which_nothing_is_known(kind, activation, reentrant):
    model = nn.Sequential(kind(activation()))
    plain = copy.deepcopy(model)
    inject(model)
    x, rows = torch.randn(3, 8, requires_grad=True), torch.zeros(3, 1)
    for _ in range(2):
        steps = []
        for each in (model[0], plain[0]):
            each.zero_grad()
            x.grad = None
            checkpoint = torch.utils.checkpoint.checkpoint
            loss = checkpoint(each, x, rows, use_reentrant=reentrant).square().sum()
            loss.backward()
            grads = (p.grad for p in each.parameters() if p.grad is not None)
            steps.append((loss.detach(), x.grad, *grads))
        torch.testing.assert_close(*steps)
