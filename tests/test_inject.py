"""Swaps are proven or refused, reported either way, and reversible."""

import copy
import functools
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import batch, tiny_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from liger_trainer import inject, restore
from liger_trainer.injection import is_injected


class Norm(nn.Module):
    """A Llama norm whose arithmetic a subclass can get slightly wrong."""

    def __init__(self, width=64, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        return self.weight * self.scale(
            h, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)

    def scale(self, x, normed):
        return normed


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
        return super().forward(x) * F.silu(gate)


@pytest.mark.parametrize(
    "look_alike",
    [EpsOutside, Clamped, Grouped, NoGradientToMean, ClampsLargeInput, InverseOnly, Gated],
)
def test_look_alike_norms_are_refused(look_alike):
    model = nn.Sequential(look_alike())
    report = inject(model)
    (row,) = [row for row in report.rows if row.rule == "rms_norm"]
    assert not row.swapped
    assert row.reason
    assert type(model[0]) is look_alike


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
    from transformers.models.llama import modeling_llama

    from liger_trainer.rules import rotary

    def opposite(q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)

    form, verdict = rotary.identify(opposite, torch.device("cpu"))
    assert verdict.equal
    assert form.inverse


def test_unknown_rotary_is_refused():
    from liger_trainer.rules import rotary

    def unknown(q, k, cos, sin):
        return q * cos[:, None] + q.flip(-1) * sin[:, None], k * cos[:, None]

    form, verdict = rotary.identify(unknown, torch.device("cpu"))
    assert form is None
    assert verdict.reason == "no known form of rotary embedding"


def test_strict_raises_and_leaves_the_model_plain():
    model = tiny_model("llama")
    model.model.norm = Clamped()
    with pytest.raises(ValueError, match=r"model.norm \(rms_norm\)"):
        inject(model, strict=True)
    assert not is_injected(model)


@pytest.mark.parametrize("rule", ["rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"])
def test_each_kernel_can_be_switched_off(rule):
    report = inject(tiny_model("llama"), {rule: False, "cross_entropy": False})
    assert report.coverage[rule] == (0, 0)
    reasons = {row.reason for row in report.rows if row.rule == rule}
    assert reasons == {"switched off in liger_kernel_config"}
    assert not report.refused


def test_cross_entropy_alone_serves_given_logits():
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    report = inject(model, {"fused_linear_cross_entropy": False})
    assert report.coverage["cross_entropy"] == (1, 1)
    inputs = batch()
    outputs, expected = model(**inputs), plain(**inputs)
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        inject(tiny_model("llama"), {"rmsnorm": True})
    with pytest.raises(ValueError, match="true or false"):
        inject(tiny_model("llama"), {"rope": "yes"})


def test_report_prints_and_serialises():
    report = inject(tiny_model("llama"))
    text = str(report)
    assert "model.layers.*.input_layernorm" in text
    assert "coverage: " in text
    data = json.loads(report.to_json())
    assert data["coverage"]["rms_norm"] == {"swapped": 5, "eligible": 5}
    assert {"site", "rule", "swapped", "reason", "max_error"} <= set(data["rows"][0])


def test_injecting_twice_is_injecting_once():
    model = tiny_model("llama")
    first = inject(model)
    second = inject(model)
    assert first.coverage == second.coverage
    restore(model)
    assert not is_injected(model)


def test_copies_and_pickles_stay_injected():
    model = tiny_model("llama")
    inject(model)
    expected = model(**batch()).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_injected(twin)
        assert torch.equal(twin(**batch()).loss, expected)
        restore(twin)
        assert type(twin) is LlamaForCausalLM
    assert is_injected(model)


def test_checkpoints_have_the_original_keys(tmp_path):
    model = tiny_model("llama")
    keys = list(model.state_dict())
    inject(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_classes_keep_their_names_and_kinship():
    model = tiny_model("llama")
    inject(model)
    norm = model.model.norm
    assert isinstance(norm, LlamaRMSNorm)
    assert type(norm).__name__ == "LlamaRMSNorm"
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.model, LlamaModel)
    signature = inspect.signature(model.forward)
    assert signature == inspect.signature(tiny_model("llama").forward)


def test_model_on_the_meta_device_is_inspected():
    config = tiny_model("llama").config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    report = inject(model)
    assert report.coverage["rms_norm"] == (5, 5)
    assert report.coverage["fused_linear_cross_entropy"] == (1, 1)
    assert [n for n, p in model.named_parameters() if not p.is_meta] == []


def test_model_without_output_embeddings_says_so():
    report = inject(LlamaModel(tiny_model("llama").config))
    (row,) = [r for r in report.rows if r.rule == "fused_linear_cross_entropy"]
    assert not row.swapped
    assert "no output embeddings" in row.reason


def test_activation_that_is_not_multiplied_at_run_time_stops_deferring(every_size):
    model = tiny_model("llama")
    inject(model)
    activation = model.model.layers[0].mlp.act_fn
    x = torch.randn(3, 5)
    torch.testing.assert_close(activation(x).sum(), F.silu(x).sum())
    assert type(activation(x)) is torch.Tensor


def test_resized_vocabulary():
    model = tiny_model("llama")
    inject(model)
    model.resize_token_embeddings(140)
    plain = copy.deepcopy(model)
    restore(plain)
    inputs = batch(vocab=140)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss, plain(**inputs).loss)


def test_tied_embeddings_get_both_gradients():
    model = tiny_model("llama", tie_word_embeddings=True)
    plain = copy.deepcopy(model)
    inject(model)
    for each in (model, plain):
        each(**batch()).loss.backward()
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad
    )


def test_labels_outside_the_vocabulary_are_reported():
    model = tiny_model("llama")
    inject(model)
    inputs = batch()
    inputs["labels"][0, 7] = 4000
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model(**inputs).loss.backward()


def test_all_labels_ignored():
    model = tiny_model("llama")
    inject(model)
    inputs = batch()
    inputs["labels"][:] = -100
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_tuples_instead_of_outputs():
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    inject(model)
    loss, logits = model(**batch(), return_dict=False)[:2]
    expected_loss, expected_logits = plain(**batch(), return_dict=False)[:2]
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(logits, expected_logits)


@pytest.mark.parametrize("target", ["attention", "head", "saved head"])
def test_peft(target):
    peft = pytest.importorskip("peft")
    settings = {
        "attention": {"target_modules": ["q_proj", "gate_proj"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[target]
    model = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
    )
    plain = copy.deepcopy(model)
    report = inject(model)
    assert not report.refused
    assert report.coverage["rms_norm"] == (5, 5)
    outputs, expected = model(**batch()), plain(**batch())
    outputs.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert outputs.logits._value is None
    trained = 0
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
            trained += 1
    assert trained
    restore(model)
    assert not is_injected(model)


@pytest.mark.gpu
def test_tensor_float_32_does_not_fool_the_probe():
    """With TF32 a plain head is itself good to three digits: that refuses nothing."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        report = inject(tiny_model("llama", "cuda"), strict=True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert report.coverage["fused_linear_cross_entropy"] == (1, 1)


@pytest.mark.parametrize(
    ("norm", "rule"),
    [
        (nn.RMSNorm(32, eps=1e-6, elementwise_affine=False), "rms_norm"),
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
