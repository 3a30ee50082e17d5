"""`activation_memory` as a budget: what is chosen, that it fits, and that nothing else changes."""

import copy
import logging

import pytest
import torch
from families import batch, tiny_model
from torch import nn

from liger_trainer import LigerTrainer, inject, restore
from liger_trainer.injection import memory_budget
from liger_trainer.injection.memory_budget import GIB, Budget, budget_of
from liger_trainer.injection.rules import activation_memory

LAYERS = 4


class Simulated:
    """A device on which a step takes what the module's docstring says, and weights grow once."""

    device = torch.device("cpu")

    def __init__(self, base, rest, cost, states=0, size=0):
        self.base, self.rest, self.cost, self.states, self.size = base, rest, cost, states, size
        self.now = self.most = base
        self.released = 0

    def allocated(self):
        return self.now

    def peak(self):
        return self.most

    def usable(self):
        return self.size

    def release(self):
        self.released += 1

    def step(self, budget, tokens):
        """One step: what was chosen, and what it took."""
        kept = budget.choose(tokens)
        if not budget.cost:
            budget.cost = self.cost
        taken = self.now + self.rest * tokens + kept * tokens * self.cost
        self.most = max(self.most, taken)
        if self.now == self.base:  # the optimizer's states come with its first step
            self.now += self.states
            self.most = max(self.most, self.now + self.states)
        return kept, taken


def simulated(asked, layers=32, **device):
    device = Simulated(**device)
    return Budget(asked, [nn.Identity()] * layers, device), device


def test_the_first_step_keeps_one_layer_and_the_next_as_many_as_fit():
    budget, device = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    assert device.step(budget, 1024) == (1, 2 * GIB + GIB + GIB // 4)
    kept, taken = device.step(budget, 1024)
    assert kept == 28  # (10 - 2 - 1) GiB / 256 MiB
    assert taken <= 10 * GIB


def test_states_that_the_first_optimizer_step_makes_are_counted_once():
    budget, device = simulated(12, base=2 * GIB, rest=1 << 20, cost=1 << 18, states=2 * GIB)
    kept = [device.step(budget, 1024)[0] for _ in range(4)]
    assert kept[0] == 1
    assert kept[-1] == 28  # (12 - 4 - 1) GiB / 256 MiB
    assert kept[1] <= kept[-1]


@pytest.mark.parametrize("seed", range(20))
def test_no_step_takes_more_than_the_budget(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    rest, cost = number(1 << 18, 1 << 21), number(1 << 16, 1 << 19)
    base, states = number(GIB // 8, 4 * GIB), number(0, 2 * GIB)
    least = base + states + rest * 4096 + cost * 4096
    budget, device = simulated(
        2 * least / GIB, base=base, rest=rest, cost=cost, states=states, layers=24
    )
    for _ in range(12):
        kept, taken = device.step(budget, number(256, 4096))
        assert taken <= 2 * least
        assert 0 <= kept <= 24


def test_all_layers_are_kept_where_they_fit():
    budget, device = simulated("auto", base=GIB, rest=1 << 18, cost=1 << 16, size=80 * GIB)
    device.step(budget, 4096)
    assert device.step(budget, 4096)[0] == 32
    assert "0 of 32 layers checkpointed" in str(budget)
    assert "auto (80.0 GiB)" in str(budget)


def test_a_budget_that_cannot_be_met_names_what_is_in_use():
    budget, device = simulated(2, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    device.step(budget, 1024)
    assert device.step(budget, 1024)[0] == 0
    device.now = 3 * GIB  # after the forward
    with pytest.raises(
        ValueError, match=r"2 GiB is less than a step takes.*leaves 3\.0 GiB in use"
    ):
        budget.check(is_first=True)
    budget.check(is_first=False)  # a longer batch later on is no reason to end a run


def test_running_out_lowers_the_budget():
    budget, device = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    device.step(budget, 1024)
    assert device.step(budget, 1024)[0] == 28
    device.most = 6 * GIB  # that was all
    assert budget.lower() == 10  # (0.95 * 6 - 2 - 1) GiB / 256 MiB
    assert device.released == 1
    assert device.step(budget, 1024)[0] == 10
    assert "lowered 1 times" in str(budget)


def test_running_out_before_anything_was_measured_is_not_tried_again():
    budget, _ = simulated(10, base=2 * GIB, rest=1 << 20, cost=1 << 18)
    assert budget.choose(1024) == 1
    assert budget.lower() == 0  # before the last layer, which would have been measured
    assert budget.choose(1024) == 0
    assert budget.choose(4096) == 0
    assert budget.choose(512) == 1  # fewer tokens may show what a layer takes


@pytest.mark.parametrize("value", [0, -1, True, "8GiB", float("nan"), float("inf"), None])
def test_values_that_are_no_budget(value):
    with pytest.raises(ValueError, match="positive number of GiB"):
        inject(tiny_model("llama"), {"activation_memory": value})


# --- models -----------------------------------------------------------------------------------


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

    def __init__(self, inner, where):
        super().__init__()
        self.inner, self.where, self.calls = inner, where, 0

    def forward(self, x):
        y = self.inner(x)
        if self.where is not None and self.training:
            if self.where == "forward":
                self.where = None
                raise torch.OutOfMemoryError("CUDA out of memory")
            y.register_hook(self._backward)
        return y

    def _backward(self, grad):
        if self.where is not None:
            self.where = None
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
    assert broken.model.layers[1].mlp.up_proj.where is None
    assert all(map(torch.equal, got, expected))


def test_accumulated_gradients_are_not_thrown_away(fixed, tmp_path):
    fixed(2)
    model = model_with_dropout()
    up = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = out = OutOnce(up, None)
    steps = []

    def second(module, grad_input, grad_output):
        steps.append(module)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    out.register_full_backward_hook(second)
    with pytest.raises(torch.OutOfMemoryError):
        trained(model, tmp_path, "auto", gradient_accumulation_steps=2)


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


# --- on a GPU ---------------------------------------------------------------------------------

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
