"""Adapters that come, go and change, and those that are left as they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import batch, tiny_model
from torch import nn
from torch.nn.utils import parametrize

from liger_trainer import inject, restore
from liger_trainer.injection.rules import lora

peft = pytest.importorskip("peft")

from lora_models import adapted, assert_trains_alike, count_fused, step  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


def test_adapters_that_come_go_and_change(monkeypatch):
    ours = adapted()
    ours.add_adapter(
        "second", peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    )
    plain = copy.deepcopy(ours)
    inject(ours)
    calls = count_fused(monkeypatch)
    both = (ours, plain)

    def compare(fused: bool):
        calls.clear()
        a, b = (model(**batch()).loss for model in both)
        torch.testing.assert_close(a, b)
        assert bool(calls) is fused

    compare(fused=True)
    first = ours(**batch()).loss
    for model in both:
        model.set_adapter("second")
    compare(fused=True)
    assert not torch.equal(ours(**batch()).loss, first)
    for model in both:
        model.base_model.set_adapter(["default", "second"])
    compare(fused=True)
    with ours.disable_adapter(), plain.disable_adapter():
        compare(fused=False)
    for model in both:
        model.merge_adapter()
    compare(fused=False)
    for model in both:
        model.unmerge_adapter()
    compare(fused=True)
    for model in both:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("second", 0.5)
    compare(fused=True)
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, use_dora=True, target_modules="all-linear"
    )
    for model in both:
        torch.manual_seed(5)
        model.add_adapter("variant", config)
        model.set_adapter("variant")
    compare(fused=False)


def test_merge_and_unload_and_saving(tmp_path):
    ours = adapted()
    plain = copy.deepcopy(ours)
    inject(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path)
    torch.testing.assert_close(loaded(**batch()).loss, plain(**batch()).loss)
    merged, expected = ours.merge_and_unload(), plain.merge_and_unload()
    assert not any(isinstance(m, lora.FusedLoRA) for m in merged.modules())
    torch.testing.assert_close(merged(**batch()).loss, expected(**batch()).loss)


def test_peft_after_injection():
    model = tiny_model("llama", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    inject(model)
    torch.manual_seed(1)
    ours = adapted(model)
    torch.manual_seed(1)
    plain = adapted(plain)
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)
    assert inject(ours).coverage["lora"] == (7, 7)
    assert_trains_alike(ours, plain)
    restore(ours)
    assert not any(isinstance(m, lora.FusedLoRA) for m in ours.modules())


class QuantisedLinear(nn.Linear):
    """Stands in for a quantized layer: its weight is none, its forward is its own."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * 0.5, self.bias)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_base_with_a_forward_of_its_own_is_called(monkeypatch, hooked):
    ours, called = adapted(), []
    for module in list(ours.modules()):
        if hasattr(module, "base_layer"):
            if hooked:
                module.base_layer.register_forward_hook(lambda *args: called.append(1))
            else:
                module.base_layer.__class__ = QuantisedLinear
    plain = copy.deepcopy(ours)
    inject(ours)
    calls = count_fused(monkeypatch)
    assert_trains_alike(ours, plain)
    assert calls == ["add_adapters"] * 7
    assert bool(called) is hooked


def test_hooks_on_an_adapter_are_run(monkeypatch):
    ours, seen = adapted(), []
    inject(ours)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_pre_hook(lambda *args: seen.append(1))
    calls = count_fused(monkeypatch)
    step(ours)
    assert seen == [1]
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "the variant DoraLinearVariant"),
        ({"lora_bias": True}, "a bias of the adapter"),
    ],
)
def test_variants_are_refused_and_run_as_they_are(settings, reason):
    ours = adapted(target_modules=["q_proj"], **settings)
    plain = copy.deepcopy(ours)
    report = inject(ours)
    (row,) = [row for row in report.rows if row.rule == "lora"]
    assert not row.swapped
    assert row.eligible
    assert reason in row.reason
    assert_trains_alike(ours, plain)


def test_an_adapter_on_the_parameter_of_the_head_is_refused():
    ours = adapted(target_modules=["q_proj"], target_parameters=["lm_head.weight"])
    plain = copy.deepcopy(ours)
    report = inject(ours)
    (row,) = [row for row in report.rows if row.rule == "fused_linear_cross_entropy"]
    assert not row.swapped
    assert "the adapter changes the parameter weight" in row.reason
    assert_trains_alike(ours, plain)


class PatchedWhileCalled(nn.Module):
    """An adapter around the head that parametrizes its weight for the call alone."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.factor = nn.Parameter(torch.tensor(1.5))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        parametrize.register_parametrization(self.base_layer, "weight", Times(self.factor))
        try:
            return self.base_layer(x)
        finally:
            parametrize.remove_parametrizations(self.base_layer, "weight", False)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = [factor]

    def forward(self, weight):
        return weight * self.factor[0]


def test_what_an_adapter_does_to_the_head_for_one_call_is_seen():
    ours = tiny_model("llama", num_hidden_layers=1)
    ours.lm_head = PatchedWhileCalled(ours.lm_head)
    plain = copy.deepcopy(ours)
    inject(ours)
    assert_trains_alike(ours, plain)


def test_a_look_alike_is_refused():
    class Halved(peft.tuners.lora.Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 0.5

    ours = adapted(target_modules=["q_proj"])
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Halved
    (row,) = [row for row in inject(ours).rows if row.rule == "lora"]
    assert not row.swapped
    assert "differs by" in row.reason


def test_switched_off_and_the_head_left_to_its_own_rule():
    ours = adapted(target_modules=["q_proj", "lm_head"])
    (row,) = [row for row in inject(ours).rows if row.rule == "lora"]
    assert row.site.endswith("q_proj")
    assert row.swapped
    (row,) = [row for row in inject(ours, {"lora": False}).rows if row.rule == "lora"]
    assert row.reason == "switched off in liger_kernel_config"


def test_fp64_adapters_under_autocast_stay_fp64():
    ours = adapted(target_modules=["q_proj"])
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A.double()
    layer.lora_B.double()
    plain = copy.deepcopy(layer)
    inject(ours)
    x = torch.randn(5, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
