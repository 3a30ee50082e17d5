"""A budget of `activation_memory` on models: it is kept, and the result is the same."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from budgets import LAYERS, fixed_budget, gradients, model_with_dropout
from families import batch, tiny_model
from simulated_device import Simulated
from torch import nn

from liger_trainer import inject, restore
from liger_trainer.injection import memory_budget
from liger_trainer.injection.memory_budget import GIB, Budget, budget_of
from liger_trainer.injection.rules import activation_memory


@pytest.fixture
def fixed(monkeypatch):
    return lambda kept: monkeypatch.setattr(activation_memory, "_budget", fixed_budget(kept))


@pytest.mark.parametrize("kept", range(LAYERS + 1))
def test_the_result_is_that_of_a_run_that_checkpoints_nothing(fixed, kept):
    fixed(kept)
    model = model_with_dropout()
    inject(model)
    expected = gradients(model)
    inject(model, {"activation_memory": "auto"})
    runs = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, *_: runs.append(module))
    got = gradients(model)
    assert all(map(torch.equal, got, expected))
    assert len(runs) == LAYERS + (LAYERS - kept)
    last = [layer.self_attn.q_proj for layer in model.model.layers[LAYERS - kept :]]
    assert all(runs.count(module) == 1 for module in last)
    assert not model.is_gradient_checkpointing


def test_a_step_without_tokens_is_the_plain_models(monkeypatch):
    model = model_with_dropout()
    plain = copy.deepcopy(model)
    inject(model, {"activation_memory": "auto"})
    budget = Budget(8, memory_budget.layers_of(model), Simulated(0, 0, 0))
    monkeypatch.setattr(activation_memory, "_budget", lambda model, asked: budget)
    empty = torch.zeros(0, 5, dtype=torch.long)
    for ids in (empty, batch()["input_ids"], empty, batch()["input_ids"]):
        if ids is not empty:
            assert model(input_ids=ids).logits.shape[:2] == ids.shape
            continue
        for each in (plain, model):
            with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
                each(input_ids=ids)


def test_without_a_cuda_device_training_is_lean_and_says_so_once(caplog):
    model = tiny_model("llama")
    report = inject(model, {"activation_memory": 8})
    row = next(row for row in report.rows if row.rule == "activation_memory")
    assert row.swapped
    assert "8 GiB" in row.reason
    with caplog.at_level(logging.WARNING):
        got, again = gradients(model), gradients(model)
    assert caplog.text.count("no budget on cpu") == 1
    inject(model)
    expected = gradients(model)
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, again, expected))
    restore(model)
    assert not any(name.startswith("_liger") for name in vars(model))


def test_models_whose_layers_cannot_be_checkpointed_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    report = inject(model, {"activation_memory": "auto"})
    reasons = [row.reason for row in report.refused if row.rule == "activation_memory"]
    assert reasons == ["no budget (auto): the model's layers cannot be checkpointed"]


def test_where_every_process_would_choose_for_itself_all_layers_are_checkpointed(caplog):
    model = model_with_dropout()
    inject(model)
    expected = gradients(model)
    inject(model, {"activation_memory": "auto"})
    model.unused = nn.Parameter(torch.empty(0))  # what is left of a shard that others hold
    runs = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, *_: runs.append(module))
    with caplog.at_level(logging.WARNING):
        got = gradients(model)
    assert all(map(torch.equal, got, expected))
    assert len(runs) == 2 * LAYERS
    assert "every layer is checkpointed: its weights are sharded" in caplog.text


def test_processes_that_share_rows_checkpoint_the_same_layers(monkeypatch):
    shared = SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=2))
    monkeypatch.setattr(memory_budget, "is_initialized", lambda: True)
    monkeypatch.setattr(memory_budget, "AcceleratorState", lambda: shared)
    assert memory_budget.why_not(model_with_dropout()).startswith("processes share its rows")


WIDE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1024,
}  # fmt: skip


def steps(model, inputs, count):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(count):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cuda.max_memory_allocated() / GIB


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_real_budget_is_kept_and_used(share):
    model = tiny_model("llama", "cuda", **WIDE).to(torch.bfloat16)
    inputs = batch(length=8192, vocab=1000, device="cuda")
    weights = copy.deepcopy(model.state_dict())

    def run(mode):
        model.load_state_dict(weights)
        inject(model, {"activation_memory": mode})
        return steps(model, inputs, 5)

    expected, most = run("lean")
    restore(model)
    model.load_state_dict(weights)
    inject(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, least = steps(model, inputs, 5)
    model.gradient_checkpointing_disable()
    asked = least + share * (most - least)
    losses, peak = run(asked)
    kept = budget_of(model).kept
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)  # attention adds atomically
    assert peak <= asked
    assert 0 < kept < 8
    one = (most - least) / 8
    assert peak >= asked - 2 * one  # not much is left unused


def in_three_quarters_of_its_memory(mode, caplog):
    """Train with this `activation_memory` in 0.75 of what it takes to keep everything; compare with
    steps that keep everything, and return the log's text."""
    model = tiny_model("llama", "cuda", **WIDE).to(torch.bfloat16)
    inputs = batch(length=8192, vocab=1000, device="cuda")
    inject(model)
    weights = copy.deepcopy(model.state_dict())
    expected, most = steps(model, inputs, 3)
    model.load_state_dict(weights)
    inject(model, {"activation_memory": mode})
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.75 * most / total)
        with caplog.at_level(logging.WARNING):
            losses, peak = steps(model, inputs, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert peak <= 0.75 * most
    return caplog.text


@pytest.mark.gpu
def test_memory_that_really_runs_out(caplog):
    """The budget promises more than the process may take."""
    text = in_three_quarters_of_its_memory(1000, caplog)
    assert text.count("out of memory: the step is repeated") == 1  # once is enough


@pytest.mark.gpu
def test_auto_takes_no_more_than_the_process_may_have(caplog):
    assert "out of memory" not in in_three_quarters_of_its_memory("auto", caplog)
