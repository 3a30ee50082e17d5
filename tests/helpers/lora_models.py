"""Tiny models with LoRA, and how one of ours is compared with PEFT's own."""

import copy

import peft
import torch
from families import batch, tiny_model
from oracle import assert_close_to_truth

from liger_trainer.injection.rules import lora


def adapted(model=None, **settings):
    model = tiny_model("llama", num_hidden_layers=1) if model is None else model
    defaults = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4}
    config = peft.LoraConfig(**{**defaults, "target_modules": "all-linear", **settings})
    return peft.get_peft_model(model, config)


def step(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_trains_alike(ours, plain, autocast=False, factor=2.0):
    """Assert that the same parameters get gradients, as close to fp64 as PEFT's."""
    truth, expected, got = step(copy.deepcopy(plain).double()), step(plain, autocast), None
    got = step(ours, autocast)
    assert list(got) == list(expected) == list(truth)
    for name, value in expected.items():
        assert_close_to_truth(name, got[name], value, truth[name], factor=factor, input_eps=2e-2)


def count_fused(monkeypatch):
    calls = []
    for name in ("lora_linear", "add_adapters"):
        original = getattr(lora, name)

        def spy(*args, original=original, name=name):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(lora, name, spy)
    return calls
