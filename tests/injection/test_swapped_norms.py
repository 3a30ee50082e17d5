"""A swapped norm is the plain norm, in every mode and after every change."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain_norm import Norm
from torch import nn
from torch.nn.utils import parametrize

from liger_trainer import inject, restore
from liger_trainer.kernels.layers import rms_norm as rms_norm_file

pytestmark = pytest.mark.usefixtures("every_size")


def rows(module: nn.Module, rule: str = "rms_norm"):
    return [row for row in inject(nn.Sequential(module)).rows if row.rule == rule]


# --- norms that are not always the same function ---------------------------------------------


class ScalesInTraining(Norm):
    def scale(self, x, normed):
        return normed * 1.01 if self.training else normed


class ScalesInEvaluation(Norm):
    def scale(self, x, normed):
        return normed if self.training else normed * 1.01


class DropsInTraining(Norm):
    def scale(self, x, normed):
        return F.dropout(normed, 1e-4, self.training)


class DrawsForNothing(Norm):
    def scale(self, x, normed):
        torch.rand(1)
        return normed


class Images(Norm):
    """Centers what has four dimensions."""

    def scale(self, x, normed):
        return normed - normed.mean() if x.dim() == 4 else normed


class ManyRows(Norm):
    def scale(self, x, normed):
        return normed * 1.01 if x.dim() > 1 and x.shape[-2] > 100 else normed


class OneRow(Norm):
    def scale(self, x, normed):
        return normed * 1.01 if x.dim() == 1 else normed


class Counts(Norm):
    calls = 0

    def scale(self, x, normed):
        self.calls += 1
        return normed


class Remembers(Norm):
    def scale(self, x, normed):
        self.last = x.detach()
        return normed


class Logs(Norm):
    def __init__(self):
        super().__init__()
        self.log = []

    def scale(self, x, normed):
        self.log.append(x.shape)
        return normed


class Alternates(Norm):
    even = [False]  # noqa: RUF012

    def scale(self, x, normed):
        self.even[0] = not self.even[0]
        return normed * (1.001 if self.even[0] else 1.0)


class GuardsAgainstNan(Norm):
    def scale(self, x, normed):
        return normed.nan_to_num()


class GuardsAgainstZero(Norm):
    def scale(self, x, normed):
        zero = (x == 0).all(-1, keepdim=True)
        return torch.where(zero, torch.ones_like(normed), normed)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (ScalesInTraining, "in training mode"),
        (ScalesInEvaluation, "neither RMSNorm nor LayerNorm"),
        (DropsInTraining, "draws random numbers"),
        (DrawsForNothing, "draws random numbers"),
        (ManyRows, "neither RMSNorm nor LayerNorm"),
        (OneRow, "neither RMSNorm nor LayerNorm"),
        (Counts, "changes itself"),
        (Remembers, "changes itself"),
        (Logs, "changes itself"),
        (Alternates, "returns something else each time"),
        (GuardsAgainstNan, "neither RMSNorm nor LayerNorm"),
        (GuardsAgainstZero, "neither RMSNorm nor LayerNorm"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_is_not_always_the_formula_is_refused(norm, reason, training):
    (row,) = rows(norm().train(training))
    assert not row.swapped
    assert row.eligible
    assert reason in row.reason


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.05),
        nn.Dropout2d(0.05),
        nn.AlphaDropout(0.05),
        nn.LeakyReLU(0.01),
        nn.Hardshrink(0.05),
        nn.Softshrink(0.05),
        nn.ELU(0.05),
        nn.Threshold(0.05, 0.01),
        nn.CosineSimilarity(),
        nn.PairwiseDistance(),
        nn.LocalResponseNorm(2),
        nn.GroupNorm(3, 3, affine=False),
        nn.GroupNorm(4, 64),
        nn.LayerNorm((4, 8)),
        nn.RReLU(0.01, 0.09),
        Images(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_over_the_last_dimension_is_not_looked_at(module):
    module.train()
    plain = copy.deepcopy(module)
    model = nn.Sequential(module)
    before = torch.get_rng_state()
    inject(model, strict=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model[0]) is type(plain)


def test_ranks_that_the_original_does_not_take_stay_with_it():
    class OnlyBatches(Norm):
        def forward(self, x):
            _batch, _length, _width = x.shape
            return super().forward(x)

    model = nn.Sequential(OnlyBatches())
    assert inject(model).coverage["rms_norm"] == (1, 1)
    with pytest.raises(ValueError, match="not enough values"):
        model(torch.randn(2, 64))


# --- what changes after the swap -------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the RMSNorm function."""
    calls = []
    original = rms_norm_file.rms_norm

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr("liger_trainer.injection.rules.norm.rms_norm", counting)
    return calls


def set_eps(norm):
    norm.eps = 0.5


def set_eps_behind_its_back(norm):
    vars(norm)["eps"] = 0.5


def add_a_bias(norm):
    norm.bias = nn.Parameter(torch.ones(64))


def register_a_bias(norm):
    norm.register_parameter("bias", None)


def parametrized(norm):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(norm, "weight", Twice())


class WithBias(Norm):
    def forward(self, x):
        y = super().forward(x)
        return y if getattr(self, "bias", None) is None else y + self.bias


@pytest.mark.parametrize(
    "change", [set_eps, set_eps_behind_its_back, add_a_bias, register_a_bias, parametrized]
)
def test_what_the_proof_does_not_hold_for_runs_the_plain_forward(change, fused):
    model = nn.Sequential(WithBias())
    plain = copy.deepcopy(model)
    assert inject(model).coverage["rms_norm"] == (1, 1)
    x = torch.randn(3, 64)
    fused.clear()
    model(x)
    assert len(fused) == 1
    for each in (model, plain):
        change(each[0])
    torch.testing.assert_close(model(x), plain(x))
    assert len(fused) == 1
    restore(model)
    torch.testing.assert_close(model(x), plain(x))


def test_what_changes_nothing_stays_fused(fused):
    """Weights that are replaced, functional calls, copies and pickles."""
    model = nn.Sequential(WithBias())
    inject(model)
    x, weight = torch.randn(3, 64), torch.randn(64)
    expected = weight * F.rms_norm(x, (64,), eps=1e-6)
    model[0].weight = nn.Parameter(weight)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    fused.clear()
    for each in (model, *twins):
        torch.testing.assert_close(each(x), expected)
    torch.testing.assert_close(
        torch.func.functional_call(model, {"0.weight": 2 * weight}, (x,)), 2 * expected
    )
    assert len(fused) == 4


def test_the_bias_of_a_layer_norm_may_go_and_come():
    model = nn.Sequential(nn.LayerNorm(64, bias=False), nn.LayerNorm(64))
    inject(model, strict=True)
    x = torch.randn(3, 64)
    model[0].bias = nn.Parameter(torch.ones(64))
    model[1].bias = None
    torch.testing.assert_close(model[0](x), F.layer_norm(x, (64,)) + 1)
    torch.testing.assert_close(model[1](x), F.layer_norm(x, (64,)))


def test_hooks_on_a_norm_see_no_probe_and_fire_as_before():
    model = nn.Sequential(Norm())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(1) or 2 * output)
    model[0].register_full_backward_hook(lambda *_: seen.append(2))
    plain = copy.deepcopy(model)
    assert inject(model).coverage["rms_norm"] == (1, 1)
    assert not seen
    x = torch.randn(3, 64, requires_grad=True)
    output = model(x)
    torch.testing.assert_close(output, plain(x))
    seen.clear()
    output.sum().backward()
    assert seen == [2]
