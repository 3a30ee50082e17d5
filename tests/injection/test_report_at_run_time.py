"""What does not run fused after all is in the report, with one warning, and is exact."""

import copy
import logging

import pytest
import torch
from families import batch, tiny_model
from lives import adapted, assert_equal_steps, injected_pair, step
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from liger_trainer import inject
from liger_trainer.deferred.logits import DeferredLogits

HEAD = "fused_linear_cross_entropy"


def row_of(report, rule, site):
    (row,) = [row for row in report.rows if (row.rule, row.site) == (rule, site)]
    return row


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 128)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class RoundedLinear(nn.Linear):
    """As libraries of quantization make them: a linear layer by name."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach().round(decimals=1) + 0 * self.weight)


class PackedWeight(nn.Parameter):
    """A weight whose elements are not what they seem."""


def another_kind(model):
    torch.manual_seed(3)
    model.lm_head = TwoLayers()


def quantized(model):
    layer = RoundedLinear(64, 128, bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer


def packed_weight(model):
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.Tensor._make_subclass(PackedWeight, weight, True)


def parametrized(model):
    weight_norm(model.lm_head)


def old_weight_norm(model):
    torch.nn.utils.weight_norm(model.lm_head)


def observed(model):
    model.seen = []
    return model.lm_head.register_forward_hook(lambda m, args, out: model.seen.append(out.shape))


def changed(model):
    return model.lm_head.register_forward_hook(lambda m, args, out: 0.5 * out)


def changed_before(model):
    return model.lm_head.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))


def changed_gradient(model):
    return model.lm_head.register_full_backward_hook(lambda m, into, out: (2.0 * into[0],))


def own_forward(model):
    model.lm_head.forward = lambda x: 2.0 * nn.functional.linear(x, model.lm_head.weight)


CHANGES = {
    another_kind: "TwoLayers is not a plain linear layer",
    quantized: "RoundedLinear is not a plain linear layer",
    packed_weight: "its weight is of type PackedWeight",
    parametrized: "it is parametrized",
    old_weight_norm: "forward hooks",
    observed: "forward hooks",
    changed: "forward hooks",
    changed_before: "forward hooks",
    changed_gradient: "backward hooks",
    own_forward: "its forward is replaced on the instance",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_head_that_cannot_be_fused_any_more(change, caplog):
    model, plain, report = injected_pair()
    step(model, batch())
    assert row_of(report, HEAD, "lm_head").swapped
    removable = [change(each) for each in (model, plain)]
    for _ in range(3):
        got, expected = step(model, batch()), step(plain, batch())
        assert type(got[2]) is torch.Tensor
        assert_equal_steps(got, expected)
        torch.testing.assert_close(got[2], expected[2])
    if change is observed:
        assert model.seen == plain.seen
    row = row_of(report, HEAD, "lm_head")
    assert not row.swapped
    assert CHANGES[change] in row.reason
    (warning,) = warnings_of(caplog)
    assert row.reason in warning
    assert report.coverage[HEAD] == (0, 1)
    if removable[0] is not None:
        for handle in removable:
            handle.remove()
        got = step(model, batch())
        assert isinstance(got[2], DeferredLogits)
        assert_equal_steps(got, step(plain, batch()))
        assert row_of(report, HEAD, "lm_head").swapped


def test_a_hook_on_every_module_sees_logits():
    model, plain, _ = injected_pair()
    seen = []

    def hook(module, args, out):
        if isinstance(module, nn.Linear) and module.out_features == 128:
            seen.append(out.shape)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        got, expected = step(model, batch()), step(plain, batch())
    finally:
        handle.remove()
    assert seen == [torch.Size([2, 17, 128])] * 2
    assert_equal_steps(got, expected)


@pytest.mark.parametrize("memory", ["lean", "keep"])
def test_adapters_that_came_after_the_injection(memory, caplog):
    model, plain, _ = injected_pair()
    report = inject(model, {"activation_memory": memory})
    targets = {"target_modules": ["q_proj", "v_proj", "lm_head"]}
    model, plain = adapted(model, **targets), adapted(plain, **targets)
    for _ in range(2):
        assert_equal_steps(step(model, batch()), step(plain, batch()))
    (warning,) = warnings_of(caplog)
    assert "inject(model) again" in warning
    assert not row_of(report, "lora", "model.layers.0.self_attn.q_proj").swapped
    assert row_of(report, HEAD, "lm_head").swapped
    assert inject(model).coverage["lora"] == (2, 2)


def test_an_adapter_of_another_kind_that_is_switched_on(caplog, every_size):
    peft = pytest.importorskip("peft")
    model = adapted(tiny_model("llama", num_hidden_layers=1), target_modules=["q_proj"])
    plain = copy.deepcopy(model)
    report = inject(model)
    site = ("lora", "model.layers.0.self_attn.q_proj")
    for each in (model, plain):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
        each.add_adapter("another", config)
    step(model, batch())
    assert row_of(report, *site).swapped
    for each in (model, plain):
        each.set_adapter("another")
    for _ in range(2):
        assert_equal_steps(step(model, batch()), step(plain, batch()))
    assert "Dora" in row_of(report, *site).reason
    (warning,) = warnings_of(caplog)
    assert "Dora" in warning
    for each in (model, plain):
        each.set_adapter("default")
    assert_equal_steps(step(model, batch()), step(plain, batch()))
    assert row_of(report, *site).swapped


def test_norms_that_were_changed_or_replaced(caplog):
    model, plain, report = injected_pair()
    for each in (model, plain):
        each.model.norm.variance_epsilon = 0.1
        each.model.layers[0].input_layernorm = LlamaRMSNorm(64, eps=1e-3)
    for _ in range(2):
        assert_equal_steps(step(model, batch()), step(plain, batch()))
    assert "changed" in row_of(report, "rms_norm", "model.norm").reason
    assert "again" in row_of(report, "rms_norm", "model.layers.0.input_layernorm").reason
    assert report.coverage["rms_norm"] == (1, 3)
    assert len(warnings_of(caplog)) == 2


REPLACED = {
    "the final norm": (
        lambda m: setattr(m.model, "norm", LlamaRMSNorm(64)),
        {("model.norm", "rms_norm")},
    ),
    "by another norm": (
        lambda m: setattr(m.model, "norm", nn.LayerNorm(64)),
        {("model.norm", "layer_norm")},
    ),
    "by none": (lambda m: setattr(m.model, "norm", nn.Identity()), set()),
    "by a copy": (lambda m: setattr(m.model, "norm", copy.deepcopy(m.model.norm)), set()),
    "the backbone by a copy": (lambda m: setattr(m, "model", copy.deepcopy(m.model)), set()),
    "an activation": (
        lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.SiLU()),
        {("model.layers.0.mlp", "swiglu")},
    ),
    "a layer that is removed": (lambda m: m.model.layers.__delitem__(0), set()),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_or_removed_is_what_the_report_tells_of(name, caplog, every_size):
    model, _, report = injected_pair()
    change, expected = REPLACED[name]
    change(model)
    model(**batch()).loss.backward()
    assert {(row.site, row.rule) for row in report.refused} == expected
    assert len(warnings_of(caplog)) == len(expected)
    reasons = {row.reason for row in report.refused}
    assert reasons <= {"added after the injection; call inject(model) again"}
    found = {(row.site, row.rule) for row in report.rows if row.swapped and row.site}
    again = {(row.site, row.rule) for row in inject(model).rows if row.swapped and row.site}
    assert found == again - expected


def test_a_copy_has_a_report_of_its_own(caplog):
    model, _, report = injected_pair()
    twin = copy.deepcopy(model)
    twin.lm_head = TwoLayers()
    step(twin, batch())
    assert len(warnings_of(caplog)) == 1
    assert row_of(report, HEAD, "lm_head").swapped


class TrainedScale(nn.Module):
    """A model whose forward does with its logits what no kernel does."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = tiny_model("llama"), nn.Parameter(torch.tensor(0.5))
        self.config, self.model = self.inner.config, self.inner.model
        self.fixed = False

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.inner.lm_head(self.model(input_ids).last_hidden_state)
        logits = logits * (0.5 if self.fixed else self.scale)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_forward_that_reads_its_logits_is_told(caplog):
    model = TrainedScale()
    plain = copy.deepcopy(model)
    report = inject(model)
    assert row_of(report, HEAD, "inner.lm_head").swapped
    inputs = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"]}
    for _ in range(2):
        torch.testing.assert_close(model(**inputs), plain(**inputs))
    assert (
        row_of(report, HEAD, "inner.lm_head").reason == "the model's own forward reads all logits"
    )
    assert len(warnings_of(caplog)) == 1
    model.fixed = True
    model(**inputs)
    assert row_of(report, HEAD, "inner.lm_head").swapped
