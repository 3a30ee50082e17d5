"""Adapters of every kind on the output head: the loss and the gradients of PEFT, a true report."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from families import batch, tiny_model
from lora_models import adapted, assert_trains_alike
from shapes import Shapes

from liger_trainer import inject, loss_scope
from liger_trainer.injection.walk import restore

HEAD = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
LINEAR = {  # their logits are a sum of linear layers
    "LoRA": peft.LoraConfig(r=4, init_lora_weights=False, **HEAD),
    "IA3 on the input": peft.IA3Config(feedforward_modules=["lm_head"], **HEAD),
    "OFT": peft.OFTConfig(oft_block_size=8, **HEAD),
    "whole head": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
}
OTHER = {
    "DoRA": peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **HEAD),
    "LoRA with a bias": peft.LoraConfig(r=4, lora_bias=True, init_lora_weights=False, **HEAD),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, total_step=9, **HEAD),
    "IA3 on the output": peft.IA3Config(feedforward_modules=[], **HEAD),
    "LoHa": peft.LoHaConfig(r=4, **HEAD),
    "VeRA": peft.VeraConfig(r=4, **HEAD),
}


def model_with(config, **changes) -> torch.nn.Module:
    """Return a model of 130 tokens whose adapter has changed from what it was at the start."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=130, **changes)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def row_of(report):
    (row,) = [row for row in report.rows if row.rule == "fused_linear_cross_entropy"]
    return row


def builds_logits(model) -> bool:
    with Shapes() as shapes:
        model(**batch()).loss.backward()
    return any(tuple(shape[-2:]) in {(17, 130), (34, 130)} for shape in shapes.seen)


@pytest.mark.parametrize("name", [*LINEAR, *OTHER])
def test_trains_alike_and_the_report_is_true(name, monkeypatch):
    """Nothing before the head is trained, so the loss needs gradients for the adapter alone."""
    monkeypatch.setattr("liger_trainer.kernels.linear.head.workspace_rows", lambda *_, **__: 4)
    ours = model_with((LINEAR | OTHER)[name])
    plain = copy.deepcopy(ours)
    report = inject(ours)
    assert row_of(report).swapped == (name in LINEAR)
    assert_trains_alike(ours, plain)
    assert row_of(report).swapped == (name in LINEAR)
    assert builds_logits(ours) == (name in OTHER)


def test_a_change_of_any_adapter_weight_is_noticed():
    model = model_with(LINEAR["IA3 on the input"])
    inject(model)
    with loss_scope():
        logits = model(input_ids=batch()["input_ids"]).logits
    with torch.no_grad():
        model.base_model.model.lm_head.ia3_l["default"].mul_(2.0)
    with pytest.raises(RuntimeError, match="have changed since"):
        logits.sum()


@pytest.mark.parametrize("name", [*LINEAR, *OTHER])
def test_a_process_without_the_weights_decides_alike(name):
    """In RAM-efficient FSDP2 loading, one process has weights, and the others are on meta."""
    model = model_with((LINEAR | OTHER)[name])
    model.to("meta")
    assert row_of(inject(model)).swapped == (name in LINEAR)


def test_the_report_follows_the_active_adapter():
    model = model_with(LINEAR["LoRA"])
    model.add_adapter("dora", OTHER["DoRA"])
    report = inject(model)
    for active, fused in [("dora", False), ("default", True), ("dora", False)]:
        model.set_adapter(active)
        assert builds_logits(model) != fused
        assert row_of(report).swapped == fused


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_fuse_with_a_head_in_bf16(autocast, monkeypatch):
    monkeypatch.setattr("liger_trainer.kernels.linear.head.workspace_rows", lambda *_, **__: 4)
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=130).bfloat16()
    ours = adapted(model, target_modules=["q_proj", "lm_head"])
    assert ours.base_model.model.lm_head.lora_A["default"].weight.dtype == torch.float32
    plain = copy.deepcopy(ours)
    assert row_of(inject(ours)).swapped
    assert_trains_alike(ours, plain, autocast)
    if not autocast:
        assert not builds_logits(ours)


@pytest.mark.parametrize("tokens", [slice(None), slice(None, -1)], ids=["all", "all but the last"])
def test_dropout_is_drawn_once(tokens):
    """The loss, and logits that are read before or after it, drop the same as PEFT's do."""
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    given = batch()

    def values():
        torch.manual_seed(0)
        model.zero_grad()
        with loss_scope():
            logits = model(input_ids=given["input_ids"]).logits
            selected, labels = logits[:, tokens].flatten(0, 1), given["labels"][:, tokens].flatten()
            top = logits.argmax(-1)
            loss = F.cross_entropy(selected, labels)
        (loss + logits.logsumexp(-1).mean()).backward()
        adapter = model.base_model.model.lm_head
        grads = [getattr(adapter, name)["default"].weight.grad for name in ("lora_A", "lora_B")]
        return [loss.detach(), logits.detach(), *grads, top, torch.rand(3)]

    inject(model)
    got = values()
    restore(model)
    torch.testing.assert_close(got, values())
