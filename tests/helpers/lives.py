"""A model and its plain twin, to change both and compare a step of training."""

import copy

import pytest
import torch
from families import tiny_model

from liger_trainer import inject
from liger_trainer.deferred.logits import DeferredLogits


def step(model, inputs):
    """Return loss, gradients and logits of one forward and backward."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), grads, outputs.logits


def assert_equal_steps(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-6)


def assert_fused_and_exact(model, plain, inputs):
    got = step(model, inputs)
    assert isinstance(got[2], DeferredLogits), "the head was called for plain logits"
    assert got[2]._value is None, "the loss computed all logits"
    assert_equal_steps(got, step(plain, inputs))


def injected_pair(**changes):
    model = tiny_model("llama", num_hidden_layers=1, **changes)
    plain = copy.deepcopy(model)
    report = inject(model)
    assert not report.refused
    return model, plain, report


def adapted(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
