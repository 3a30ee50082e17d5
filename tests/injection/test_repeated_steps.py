"""A step that runs out of memory is repeated, and a layer computed again: nothing counts twice."""

import copy
import logging
import random

import numpy as np
import pytest
import tiny
import torch
from budgets import LAYERS, OutOnce, fixed_budget, gradients, model_with_dropout, trained
from torch import nn

from liger_trainer import inject
from liger_trainer.injection import rewind
from liger_trainer.injection.memory_budget import budget_of
from liger_trainer.injection.rules import activation_memory


@pytest.fixture
def fixed(monkeypatch):
    return lambda kept: monkeypatch.setattr(activation_memory, "_budget", fixed_budget(kept))


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
