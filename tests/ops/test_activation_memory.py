"""What backward computes again instead of keeping: fewer bytes, the same bits."""

import copy
import pickle

import pytest
import torch
from census import kept_bytes_per_token_and_layer
from families import batch, tiny_model

from liger_trainer import inject, restore
from liger_trainer.injection.rules import activation_memory
from liger_trainer.kernels import recompute

HIDDEN, INTERMEDIATE = 64, 96


def prepared(mode: str, family: str = "llama", **changes):
    model = tiny_model(family, **changes)
    inject(model, {"activation_memory": mode})
    return model


def step(model, **scope):
    """Loss and gradients of one step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=scope.get("autocast", False)):
        loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_bytes_kept_per_token_and_layer(every_size):
    """As the kernels need them: residuals, gate and up, q, k, v, attention's output, statistics."""
    inputs = batch(length=33)
    del inputs["attention_mask"]

    def kept(mode):
        return kept_bytes_per_token_and_layer(
            lambda layers: prepared(mode, num_hidden_layers=layers).to(torch.bfloat16), inputs
        )

    needed = 2 * (2 * HIDDEN + 2 * INTERMEDIATE + 2 * HIDDEN + HIDDEN)
    statistics = 3 * 4 * 4  # fp32, 4 heads or rows
    assert needed <= kept("lean") <= needed + statistics
    assert kept("keep") >= needed + 2 * (2 * HIDDEN + INTERMEDIATE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("autocast", [False, True])
def test_models_train_the_same(every_size, family, autocast):
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    expected = step(prepared("keep", family), autocast=autocast)
    for a, b in zip(step(prepared("lean", family), autocast=autocast), expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(every_size, use_reentrant):
    results = []
    for mode in ("keep", "lean"):
        model = prepared(mode)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        results.append(step(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_under_compile(every_size):
    model = prepared("lean", num_hidden_layers=1)
    expected = step(copy.deepcopy(model))
    for a, b in zip(step(torch.compile(model, backend="eager")), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_stands_aside_for_other_saved_tensor_hooks(every_size):
    model, seen = prepared("lean"), []

    def pack(t):
        seen.append(t.shape)
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch()).loss.backward()
    assert torch.Size([2 * 17, HIDDEN]) in seen  # a norm's output, as its reader keeps it
    with torch.autograd.graph.save_on_cpu():
        model(**batch()).loss.backward()


@pytest.mark.parametrize("short", [True, False])
def test_short_inputs_are_left_alone(monkeypatch, short):
    """By the elements of the hidden states, of which a configuration tells the width."""
    model = prepared("lean")
    elements = batch()["input_ids"].numel() * HIDDEN
    monkeypatch.setattr(activation_memory, "MIN_ELEMENTS", elements + HIDDEN * short)
    packed = []
    monkeypatch.setattr(recompute, "_pack", lambda t: packed.append(t) or t)
    monkeypatch.setattr(recompute, "_unpack", lambda t: t)
    step(model)
    assert bool(packed) is not short


def test_where_torch_allows_no_hooks(every_size):
    model = prepared("lean")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        step(model)


def test_switch_and_report():
    model = tiny_model("llama")
    assert inject(model).coverage["activation_memory"] == (1, 1)
    assert inject(model, {"activation_memory": "keep"}).coverage["activation_memory"] == (0, 0)
    with pytest.raises(ValueError, match="'lean', 'keep'"):
        inject(model, {"activation_memory": "less"})


def test_model_with_two_swaps_is_copied_pickled_and_restored(every_size):
    model = prepared("lean")
    plain = type(tiny_model("llama"))
    expected = step(copy.deepcopy(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(twin)[0], expected[0])
        restore(twin)
        assert type(twin) is plain
