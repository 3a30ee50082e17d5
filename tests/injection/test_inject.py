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
from liger_trainer.injection.walk import is_injected
from liger_trainer.report import Status


class ClampedNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__(64)

    def forward(self, x):
        return super().forward(x).clamp(-2.0, 2.0)


def test_strict_raises_and_leaves_the_model_plain():
    model = tiny_model("llama")
    model.model.norm = ClampedNorm()
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


def test_every_row_has_one_status():
    model = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.LayerNorm(64))
    model[1].forward = functools.partial(nn.LayerNorm.forward, model[1])
    report = inject(model, {"activation_memory": "keep"})
    assert {row.site or row.rule: row.status for row in report.rows} == {
        "0": Status.SWAPPED,
        "1": Status.REFUSED,
        "activation_memory": Status.OFF,
        "fused_linear_cross_entropy": Status.NOT_APPLICABLE,
    }
    assert [row.site for row in report.refused] == ["1"]
    assert report.coverage["fused_linear_cross_entropy"] == (0, 0)
    rows = json.loads(report.to_json())["rows"]
    assert [(row["status"], row["swapped"], row["eligible"]) for row in rows] == [
        ("swapped", True, True),
        ("refused", False, True),
        ("off", False, False),
        ("not applicable", False, False),
    ]


def test_an_adapter_on_the_head_is_one_row_with_the_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, task_type="CAUSAL_LM")
    report = inject(peft.get_peft_model(tiny_model("llama"), config))
    rows = [row for row in report.rows if "lm_head" in row.site or not row.site]
    assert [(row.site, row.rule) for row in rows] == [
        ("", "activation_memory"),
        ("lm_head", "fused_linear_cross_entropy"),
    ]


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
    x = torch.randn(3, 5, requires_grad=True)
    torch.testing.assert_close(activation(x).sum(), F.silu(x).sum())
    assert type(activation(x)) is torch.Tensor
    restore(model)
    assert not [name for name in vars(activation) if name.startswith("_liger")]


def test_input_of_a_deferred_activation_that_is_changed_in_place_is_reported(every_size):
    model = tiny_model("llama")
    inject(model)
    gate, up = torch.randn(3, 5, requires_grad=True) * 1.0, torch.randn(3, 5)
    activated = model.model.layers[0].mlp.act_fn(gate)
    gate.add_(1.0)  # in the plain model, backward raises
    with pytest.raises(RuntimeError, match="changed in place"):
        activated * up


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
