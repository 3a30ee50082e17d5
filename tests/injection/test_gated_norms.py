"""Norms with a gate are recognized by what they compute; experts keep their fused product."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from families import batch, tiny_model
from torch import nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from liger_trainer import inject, restore
from liger_trainer.injection.rules import gated, gated_norm
from liger_trainer.kernels import runtime


def mamba2_norm(width: int) -> nn.Module:
    """Mamba-2's norm of one group; older versions of transformers know no others."""
    grouped = "group_size" in inspect.signature(MambaRMSNormGated).parameters
    return MambaRMSNormGated(width, **({"group_size": width} if grouped else {}))


NORMS = {
    "silu(gate) after it, weight after the cast": lambda: Qwen3NextRMSNormGated(64),
    "sigmoid(gate) after it, weight after the cast": lambda: Qwen4ExpTextRMSNormGated(
        64, activation="sigmoid"
    ),
    "sigmoid(gate) after it, weight before the cast": lambda: KimiLinearRMSNormGated(64),
    "silu(gate) before it, weight after the cast": lambda: mamba2_norm(64),
    "silu(gate) before it, groups of 16, weight after the cast": lambda: Zamba2RMSNormGated(64, 16),
    "silu(gate) before it, groups of 32, weight before the cast": lambda: FalconH1RMSNormGated(
        64, n_groups=2, norm_before_gate=False
    ),
    "silu(gate) after it, groups of 32, weight before the cast": lambda: FalconH1RMSNormGated(
        64, n_groups=2
    ),
}


@pytest.fixture
def fused(monkeypatch):
    """Counts the fused norms."""
    calls = []
    original = gated_norm.gated_rms_norm

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(gated_norm, "gated_rms_norm", counting)
    return calls


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_is_recognised_and_equal(form, dtype, every_size, fused):
    module = NORMS[form]().to(dtype)
    nn.init.normal_(module.weight)
    plain = copy.deepcopy(module)
    (row,) = [r for r in inject(nn.Sequential(module), strict=True).rows if r.rule == "rms_norm"]
    assert row.reason == f"RMSNorm, {form}"
    x, gate = tensors = [torch.randn(3, 5, 64, dtype=dtype, requires_grad=True) for _ in range(2)]
    fused.clear()
    results = []
    for each in (module, plain):
        y = each(*tensors)
        results.append((y, *torch.autograd.grad(y.sum(), (*tensors, each.weight))))
    assert len(fused) == 1
    torch.testing.assert_close(*results)
    torch.testing.assert_close(module(x, gate=gate), plain(x, gate))
    assert len(fused) == 2


def test_what_the_proof_does_not_hold_for_runs_the_plain_forward(every_size, fused):
    model = nn.Sequential(Zamba2RMSNormGated(64, 16))
    plain = copy.deepcopy(model)
    inject(model, strict=True)
    x, gate = torch.randn(2, 3, 64)
    fused.clear()
    for args in ((x,), (x, None), (x, gate.half()), (x, gate[:1])):
        torch.testing.assert_close(model[0](*args), plain[0](*args))
    for module in (model[0], plain[0]):
        module.group_size = 32
    torch.testing.assert_close(model[0](x, gate), plain[0](x, gate))
    assert not fused
    restore(model)
    assert type(model[0]) is Zamba2RMSNormGated


def test_small_inputs_stay_with_the_plain_forward(fused):
    model = nn.Sequential(Qwen3NextRMSNormGated(64))
    inject(model, strict=True)
    fused.clear()
    model[0](*torch.randn(2, 3, 64))
    assert not fused


class AddsItsGate(Qwen3NextRMSNormGated):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states, gate) + gate


class ClampsItsGate(Qwen3NextRMSNormGated):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states, gate.clamp(max=50.0))


class GatesInTraining(Qwen3NextRMSNormGated):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states, gate if self.training else 1.01 * gate)


@pytest.mark.parametrize("look_alike", [AddsItsGate, ClampsItsGate, GatesInTraining])
def test_look_alikes_are_refused(look_alike):
    model = nn.Sequential(look_alike(64))
    inject(model)
    assert type(model[0]) is look_alike


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_keep_their_fused_product(implementation, monkeypatch):
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    plain = copy.deepcopy(model)
    assert inject(model).coverage["swiglu"] == (2, 2)
    products = []
    original = gated.Gate.product

    def counting(self, gate, up):
        products.append(gate.shape)
        return original(self, gate, up)

    monkeypatch.setattr(gated.Gate, "product", counting)
    with runtime.every_size():
        loss = model(**batch()).loss
    assert len(products) >= 2
    loss.backward()
    expected = plain(**batch()).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_gate_that_is_no_gate_is_left_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x, residual):
            return F.rms_norm(x, (64,), self.weight, self.eps) + residual

    assert not any(row.swapped for row in inject(nn.Sequential(Residual())).rows)
