"""Weights and losses that became NaN."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from run_folders import state, train
from safetensors.torch import load_file
from transformers import Trainer, TrainerControl

from liger_trainer.runs import health


def test_weights_that_became_nan_are_told_and_not_saved(finished, capsys):
    shutil.rmtree(finished)
    assert train("recipe.yaml", "training.learning_rate=1e38", "training.max_grad_norm=0") == 1
    assert "the weights became NaN or infinite by step" in capsys.readouterr().err
    assert state(finished)["state"] == "diverged"
    assert not (finished / "model.safetensors").exists()
    assert not list(finished.glob("checkpoint-*"))


def test_a_loss_that_was_nan_is_told(finished, monkeypatch, capsys):
    shutil.rmtree(finished)
    plain = Trainer.training_step

    def step(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss

    monkeypatch.setattr(Trainer, "training_step", step)
    assert train("recipe.yaml", "training.max_steps=2", "training.save_strategy=no") == 1
    assert "a loss was NaN or infinite, logged at step 2" in capsys.readouterr().err
    assert load_file(finished / "model.safetensors")


@pytest.mark.parametrize("norm", [1.0, math.nan])
def test_processes_check_the_weights_together(monkeypatch, norm):
    """Whichever of two processes had the bad gradient norm, both take part in what follows."""
    agreed = iter([True, False, False])  # a bad number; a bad loss; weights that are not finite
    monkeypatch.setattr(health, "in_any_process", lambda found, args: next(agreed))
    watch, state = health.Health(), SimpleNamespace(global_step=1)
    logs = {"grad_norm": norm}
    watch.on_log(None, state, TrainerControl(), logs=logs, model=torch.nn.Linear(1, 1))
    assert next(agreed, None) is None
    assert not watch.bad_losses
