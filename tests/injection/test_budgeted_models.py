"""A budget of `activation_memory` on models: it is kept, and the result is the same."""

import copy
import logging
import random

import numpy as np
import pytest
import tiny
import torch
from families import batch, tiny_model
from simulated_device import Simulated
from torch import nn

from liger_trainer import LigerTrainer, inject, restore
from liger_trainer.injection import memory_budget, rewind
from liger_trainer.injection.memory_budget import GIB, Budget, budget_of
from liger_trainer.injection.rules import activation_memory

LAYERS = 4


@pytest.fixture
def fixed(monkeypatch):
    """Gives every model a budget that keeps so many layers, on any device."""

    def choose(kept):
        class Fixed(Budget):
            def choose(self, tokens):
                self.kept, self.cost = kept, 1.0
                return kept

        def make(model, asked):
            if "_liger_budget" not in vars(model):
                layers = memory_budget.layers_of(model)
                model._liger_budget = Fixed(asked, layers, Simulated(0, 0, 0))
            return model._liger_budget

        monkeypatch.setattr(activation_memory, "_budget", make)

    return choose


def model_with_dropout():
    return tiny_model("llama", num_hidden_layers=LAYERS, attention_dropout=0.2)


def gradients(model, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return [
        loss.detach(),
        torch.rand(3),
        *(p.grad.clone() for p in model.parameters() if p.numel()),
    ]


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


class OutOnce(nn.Module):
    """A layer of a model that runs out of memory, once, in forward or in backward."""

    def __init__(self, inner, *where):
        super().__init__()
        self.inner, self.where = inner, list(where)

    def forward(self, x):
        y = self.inner(x)
        if self.where and self.training:
            if self.where == ["forward"]:
                self._run_out()
            y.register_hook(self._backward)
        return y

    def _backward(self, grad):
        if self.where:
            self._run_out()

    def _run_out(self):
        self.where.clear()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_forward_that_runs_out_is_repeated_with_the_same_result(fixed, caplog):
    fixed(2)
    model = model_with_dropout()
    inject(model)
    expected = gradients(model)
    inject(model, {"activation_memory": "auto"})
    up = model.model.layers[2].mlp.up_proj
    model.model.layers[2].mlp.up_proj = OutOnce(up, "forward")
    with caplog.at_level(logging.WARNING):
        got = gradients(model)
    assert all(map(torch.equal, got, expected))
    assert budget_of(model).kept == 1
    assert "repeated with 3 of 4 layers checkpointed" in caplog.text


def trained(model, folder, mode, **changes):
    from transformers import TrainingArguments

    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        use_liger_kernel=True, liger_kernel_config={"activation_memory": mode},
        disable_tqdm=True, logging_steps=1, save_strategy="no", seed=5, **changes,
    )  # fmt: skip
    inputs = batch(length=9)
    rows = [{name: tensor[i % 2] for name, tensor in inputs.items()} for i in range(4)]
    trainer = LigerTrainer(model, args, train_dataset=rows)
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]


def test_a_step_that_runs_out_in_backward_is_repeated_with_the_same_result(fixed, tmp_path):
    fixed(2)
    model = model_with_dropout()
    broken = copy.deepcopy(model)
    expected = trained(model, tmp_path, "lean")
    up = broken.model.layers[1].mlp.up_proj
    broken.model.layers[1].mlp.up_proj = OutOnce(up, "backward")
    got = trained(broken, tmp_path, "auto")
    assert not broken.model.layers[1].mlp.up_proj.where
    assert all(map(torch.equal, got, expected))


def test_accumulated_gradients_are_not_thrown_away(fixed, tmp_path):
    fixed(2)
    model = model_with_dropout()
    up = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = out = OutOnce(up)
    steps = []

    def second(module, grad_input, grad_output):
        steps.append(module)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    out.register_full_backward_hook(second)
    with pytest.raises(torch.OutOfMemoryError):
        trained(model, tmp_path, "auto", gradient_accumulation_steps=2)


class Counting(nn.Module):
    """A layer with running statistics, counters and random numbers of every kind."""

    def __init__(self, inner, large=False):
        super().__init__()
        self.inner, self.calls, self.last = inner, 0, None
        self.norm = nn.BatchNorm1d(inner.out_features)  # changes buffers behind their versions
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("large", torch.zeros(rewind.LARGEST_COPY + 1 if large else 2))

    def forward(self, x):
        y = self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)
        self.calls, self.last = self.calls + 1, y.sum().item()
        self.mean.mul_(0.9).add_(0.1 * y.detach().square().mean())
        self.replaced = self.replaced + self.calls
        self.large += 1
        return y * (1 + self.calls + self.mean.detach())


def state_of(model):
    counting = [m for m in model.modules() if isinstance(m, Counting)]
    return [
        *(b.clone() for m in counting for b in m.buffers()),
        *(torch.tensor([m.calls, m.last]) for m in counting),
        torch.tensor([random.random(), np.random.rand()]),
    ]


def counting_model(large=False):
    model = model_with_dropout()
    for layer in (0, 3):
        mlp = model.model.layers[layer].mlp
        mlp.up_proj = Counting(mlp.up_proj, large)
    draw = lambda *_: (random.random(), np.random.rand())  # noqa: E731
    model.model.embed_tokens.register_forward_hook(lambda *_: draw() and None)
    return model


@pytest.mark.parametrize("kept", [0, 2, LAYERS])
def test_what_a_forward_counts_is_counted_once(fixed, kept):
    """Also in the layers that backward computes again."""
    fixed(kept)
    plain = counting_model()
    model = copy.deepcopy(plain)
    inject(plain)
    inject(model, {"activation_memory": "auto"})
    for _ in range(3):
        assert all(map(torch.equal, gradients(model), gradients(plain)))
    assert all(map(torch.equal, state_of(model)[:-1], state_of(plain)[:-1]))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_a_step_that_runs_out_counts_is_counted_once(fixed, tmp_path, where):
    fixed(2)
    plain = counting_model()
    model = copy.deepcopy(plain)
    mlp = model.model.layers[2].mlp
    mlp.down_proj = out = OutOnce(mlp.down_proj, where)
    results = []
    for each, mode in ((plain, "lean"), (model, "auto")):
        results.append([*trained(each, tmp_path, mode), *state_of(each)])
    assert not out.where
    assert all(map(torch.equal, *results))


def test_a_step_that_is_repeated_is_logged_once(fixed, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig

    from liger_trainer.trl import SFTTrainer

    fixed(2)
    logs = []
    for runs_out in (False, True):
        model = model_with_dropout()
        mlp = model.model.layers[2].mlp
        mlp.down_proj = out = OutOnce(mlp.down_proj, *["backward"] * runs_out)
        args = SFTConfig(
            str(tmp_path), max_steps=2, logging_steps=2, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            use_liger_kernel=True, liger_kernel_config={"activation_memory": "auto"},
        )  # fmt: skip
        rows = Dataset.from_list([{"input_ids": list(range(3, 12 + i))} for i in range(16)])
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tiny.tokenizer())
        trainer.train()
        assert not out.where
        entry = trainer.state.log_history[0]
        logs.append({name: entry[name] for name in ("loss", "mean_token_accuracy", "num_tokens")})
    assert logs[0] == logs[1]


def test_a_forward_that_changed_a_large_buffer_is_not_repeated(fixed, caplog):
    fixed(2)
    model = counting_model(large=True)
    mlp = model.model.layers[3].mlp
    mlp.down_proj = OutOnce(mlp.down_proj, "forward")
    inject(model, {"activation_memory": "auto"})
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model)
    assert "the forward has changed Counting.large" in caplog.text


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


@pytest.mark.gpu
def test_memory_that_really_runs_out(caplog):
    """The budget promises more than the process may take."""
    model = tiny_model("llama", "cuda", **WIDE).to(torch.bfloat16)
    inputs = batch(length=8192, vocab=1000, device="cuda")
    inject(model)
    weights = copy.deepcopy(model.state_dict())
    expected, most = steps(model, inputs, 3)
    model.load_state_dict(weights)
    inject(model, {"activation_memory": 1000})
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
    assert caplog.text.count("the step is repeated") == 1  # once is enough
    assert "out of memory: the step is repeated" in caplog.text
