"""Detect that training has diverged: weights or losses that are NaN or infinite."""

from __future__ import annotations

import math

import torch
from transformers import TrainerCallback

from liger_trainer.runs.engine import in_any_process


class Health(TrainerCallback):
    """Stop training once weights are not finite, and record losses that are not.

    Trainer replaces a NaN loss in its log by a mean of earlier ones, so the losses themselves are
    watched. The weights are checked when a loss or a gradient norm is not finite, and before every
    save. (A gradient norm alone may be infinite: an fp16 scaler skips such steps.)
    """

    def __init__(self):
        self.diverged: int | None = None  # the step after which the weights were not finite
        self.bad_losses: list[int] = []  # the steps at which bad losses were logged
        self._bad = torch.tensor(False)

    def watch(self, trainer) -> None:
        """Watch the loss of every step of `trainer`, without waiting for the device."""
        step = trainer.training_step

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            bad = ~torch.isfinite(loss.detach()).all()
            self._bad = self._bad.to(bad.device) | bad
            return loss

        trainer.training_step = training_step

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        logs = logs or {}
        bad = bool(self._bad) or not _finite(logs.get("eval_loss"))
        self._bad = torch.tensor(False)
        if not in_any_process(bad or not _finite(logs.get("grad_norm")), args):
            return control
        if in_any_process(bad, args):
            self.bad_losses.append(state.global_step)
        if not self.check(model, args, state.global_step):
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False
        return control

    def check(self, model, args, step: int) -> bool:
        """Return whether the trainable weights of all processes are finite."""
        if self.diverged is None and in_any_process(not weights_are_finite(model), args):
            self.diverged = step
        return self.diverged is None


def weights_are_finite(model) -> bool:
    """Return whether this process's part of the trainable weights is finite."""
    flags = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter).detach()  # the shard under ZeRO-3
            part = part.to_local() if hasattr(part, "to_local") else part
            flags.append(torch.isfinite(part).all())
    by_device = {flag.device: [f for f in flags if f.device == flag.device] for flag in flags}
    return all(bool(torch.stack(same).all()) for same in by_device.values())


def _finite(value) -> bool:
    return value is None or math.isfinite(float(value))
