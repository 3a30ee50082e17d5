"""Modules that look like what a rule seeks: judged by what they compute, one by one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from plain_mlp import Mlp
from plain_norm import Norm
from torch import nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama import modeling_llama

from liger_trainer import inject
from liger_trainer.injection.rules import rotary
from liger_trainer.report import Status


class EpsOutside(Norm):
    def scale(self, x, normed):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class Clamped(Norm):
    def scale(self, x, normed):
        return normed.clamp(-2.5, 2.5)


class Grouped(Norm):
    def scale(self, x, normed):
        groups = x.unflatten(-1, (2, -1))
        return (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)


class NoGradientToMean(Norm):
    def scale(self, x, normed):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


class ClampsLargeInput(Norm):
    def scale(self, x, normed):
        x = x.clamp(-50, 50)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class InverseOnly(Norm):
    def forward(self, x):
        return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


class Gated(Norm):
    def forward(self, x, gate):
        return super().forward(x) * F.relu(gate)


@pytest.mark.parametrize(
    "look_alike",
    [EpsOutside, Clamped, Grouped, NoGradientToMean, ClampsLargeInput, Gated],
)
def test_look_alike_norms_are_refused(look_alike):
    model = nn.Sequential(look_alike())
    report = inject(model)
    (row,) = [row for row in report.rows if row.rule == "rms_norm"]
    assert not row.swapped
    assert row.reason
    assert type(model[0]) is look_alike


def test_what_returns_no_row_is_no_norm():
    assert "rms_norm" not in inject(nn.Sequential(InverseOnly())).coverage


def test_the_honest_norm_is_swapped():
    model = nn.Sequential(Norm())
    assert inject(model).coverage["rms_norm"] == (1, 1)


def test_instances_are_judged_one_by_one():
    class SometimesGrouped(Norm):
        def __init__(self, groups):
            super().__init__()
            self.groups = groups

        def scale(self, x, normed):
            return Grouped.scale(self, x, normed) if self.groups > 1 else normed

    model = nn.Sequential(SometimesGrouped(1), SometimesGrouped(2))
    rows = [row for row in inject(model).rows if row.rule == "rms_norm"]
    assert [row.swapped for row in rows] == [True, False]


def test_norms_at_initialisation_hide_nothing():
    """With weight 1, a (1 + weight) norm of weight 0 looks the same: weights are drawn anew."""

    class OffsetNorm(Norm):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.weight)

        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
            return (h * (1.0 + self.weight.float())).type_as(x)

    model = nn.Sequential(OffsetNorm())
    (row,) = [row for row in inject(model).rows if row.rule == "rms_norm"]
    assert row.reason == "RMSNorm, 1 + weight before the cast"


def test_activation_that_clamps_its_gate_is_refused(monkeypatch):
    """Small inputs cannot tell a clamped SiLU from SiLU."""
    model = tiny_model("llama")
    activation = type(model.model.layers[0].mlp.act_fn)
    monkeypatch.setattr(activation, "forward", lambda self, x: F.silu(x.clamp(max=7.0)))
    report = inject(model)
    assert report.coverage["swiglu"] == (0, 2)
    assert {row.reason.split()[-4:][0] for row in report.refused} == {"neither"}


def test_norm_with_an_optional_gate_uses_it():
    class OptionalGate(Norm):
        def forward(self, x, gate=None):
            y = super().forward(x)
            return y if gate is None else y * F.silu(gate)

    model = nn.Sequential(OptionalGate())
    x, gate = torch.randn(2, 64), torch.randn(2, 64)
    plain, gated = model[0](x), model[0](x, gate=gate)
    assert inject(model).coverage["rms_norm"] == (1, 1)
    torch.testing.assert_close(model[0](x=x), plain)
    torch.testing.assert_close(model[0](x, gate=gate), gated)
    torch.testing.assert_close(model[0](x, gate), gated)


def test_module_whose_forward_is_replaced_on_the_instance_is_refused():
    """As accelerate's hooks for several devices do: a swap would have no effect there."""
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = functools.partial(type(norm).forward, norm)
    (row,) = [row for row in inject(model).rows if row.site == "model.norm"]
    assert not row.swapped
    assert "replaced on the instance" in row.reason


def test_rotary_with_the_opposite_sign_is_recognised_as_such():
    def opposite(q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)

    found, verdict = rotary.identify(opposite, torch.device("cpu"))
    assert verdict.equal
    assert found.form.inverse


def test_unknown_rotary_is_refused():
    def unknown(q, k, cos, sin):
        return q * cos[:, None] + q.flip(-1) * sin[:, None], k * cos[:, None]

    found, verdict = rotary.identify(unknown, torch.device("cpu"))
    assert found is None
    assert verdict.reason == "no known form of rotary embedding"


@pytest.mark.parametrize(
    ("norm", "rule"),
    [
        (nn.RMSNorm(32, eps=1e-6, elementwise_affine=False), "rms_norm"),
        (Gemma3nRMSNorm(32, with_scale=False), "rms_norm"),
        (nn.RMSNorm(32, eps=1e-6), "rms_norm"),
        (nn.LayerNorm(32), "layer_norm"),
        (nn.LayerNorm(32, bias=False), "layer_norm"),
        (nn.LayerNorm(32, elementwise_affine=False), "layer_norm"),
    ],
)
def test_norms_of_torch_with_and_without_parameters(norm, rule):
    model = nn.Sequential(norm)
    x = torch.randn(2, 3, 32)
    expected = model(x)
    assert inject(model).coverage[rule] == (1, 1)
    torch.testing.assert_close(model(x), expected)


def test_instances_that_differ_in_a_private_attribute_are_judged_one_by_one():
    class PrivatelyGrouped(Norm):
        def __init__(self, groups):
            super().__init__()
            self._groups = groups

        def scale(self, x, normed):
            return Grouped.scale(self, x, normed) if self._groups > 1 else normed

    model = nn.Sequential(PrivatelyGrouped(1), PrivatelyGrouped(2))
    rows = [row for row in inject(model).rows if row.rule == "rms_norm"]
    assert [row.swapped for row in rows] == [True, False]


def without_heads(x, cos, sin):
    return torch.einsum("bsd,bsd->bsd", x, cos) + x.flip(-1) * sin


def with_sections(q, k, cos, sin, sections):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def no_angles(q, k, cost, using):
    raise AssertionError("it must not be run")


@pytest.mark.parametrize(
    ("function", "statuses"),
    [
        (without_heads, [Status.REFUSED]),
        (with_sections, [Status.NOT_APPLICABLE]),
        (no_angles, []),
    ],
)
def test_functions_of_angles_that_are_not_taken_have_a_row(function, statuses):
    scope = {"rotate": function}
    exec("def forward(self, x):\n    return rotate(x)", scope)
    attention = type("Attention", (nn.Module,), {"forward": scope["forward"]})
    rows = [row for row in inject(nn.Sequential(attention())).rows if row.rule == "rope"]
    assert [row.status for row in rows] == statuses
    assert all(row.reason.startswith(function.__name__) for row in rows)


class Renamed(nn.Module):
    """LayerNorm whose parameters have names of their own, the shift first."""

    def __init__(self, width):
        super().__init__()
        self.eps = 1e-5
        self.add, self.times = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.times, self.add, self.eps)


class OnlyShifted(Renamed):
    def __init__(self, width):
        super().__init__(width)
        del self.times

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], None, self.add, self.eps)


@pytest.mark.parametrize("norm", [Renamed, OnlyShifted])
def test_the_bias_of_a_norm_is_found_by_what_it_does(norm):
    model = nn.Sequential(norm(32))
    x = torch.randn(2, 3, 32)
    expected = model(x)
    assert inject(model).coverage["layer_norm"] == (1, 1)
    torch.testing.assert_close(model(x), expected)


class SquaredRelu(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.Tanh, SquaredRelu])
def test_an_activation_without_a_kernel_is_refused_by_what_it_computes(activation):
    (row,) = [row for row in inject(nn.Sequential(Mlp(activation()))).rows if row.rule == "swiglu"]
    assert row.status is Status.REFUSED
    assert row.reason == f"{activation.__name__} is neither SiLU nor GELU"


@pytest.mark.parametrize("other", [nn.Identity(), nn.Dropout(), nn.Softmax(-1), Halved()])
def test_what_is_no_activation_has_no_row(other):
    assert "swiglu" not in inject(nn.Sequential(Mlp(other))).coverage
