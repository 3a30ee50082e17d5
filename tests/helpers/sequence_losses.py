"""What the tests of losses on log-probabilities share: random batches, gradients by differences."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch

FP64 = {"rtol": 1e-9, "atol": 1e-11}
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-7}  # of central differences with the step below
_STEP = 1e-5


def random_log_probs(*shape: int, scale: float = 1.5) -> torch.Tensor:
    return -scale * torch.rand(*shape, dtype=torch.float64) - 0.01


def random_mask(*shape: int) -> torch.Tensor:
    """Return a mask with runs of True of different lengths (at least 1), after a short prompt."""
    mask = torch.zeros(*shape, dtype=torch.bool)
    T = shape[-1]
    for i, row in enumerate(mask.view(-1, T)):
        start = i % 3
        row[start : start + 1 + (5 * i + 2) % (T - start)] = True
    return mask


def finite_differences(function: Callable[[list], float], x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function of nested lists at `x`, by central differences in fp64."""
    grad = torch.empty_like(x)
    for i in range(x.numel()):
        values = []
        for sign in (1, -1):
            moved = x.clone()
            moved.view(-1)[i] += sign * _STEP
            values.append(function(moved.tolist()))
        grad.view(-1)[i] = (values[0] - values[1]) / (2 * _STEP)
    return grad


def value_and_grad(function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value of a scalar function of a tensor, and its gradient by autograd."""
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_agrees(
    loss: Callable[[torch.Tensor], torch.Tensor], slow: Callable[[list], float], x: torch.Tensor
) -> None:
    """Assert that a scalar loss and its gradient match an implementation on plain lists."""
    value, grad = value_and_grad(loss, x)
    expected = torch.tensor(slow(x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(value, expected, **FP64)
    torch.testing.assert_close(grad, finite_differences(slow, x), **DIFFERENCES)


def assert_finite(value: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor) -> None:
    """Assert that value and gradient are finite, and the gradient is 0 outside the mask."""
    assert torch.isfinite(value).all(), value
    assert torch.isfinite(grad).all(), grad
    assert not grad[~mask].any()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """Return log(1 + e^x) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def trl_self(loss, **attributes) -> SimpleNamespace:
    """What TRL's trainers read of themselves when they compute a loss, without a model: the
    options of `loss`, one process, no auxiliary loss."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    return SimpleNamespace(
        **{
            **{f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)},
            "model": SimpleNamespace(training=True),
            "accelerator": accelerator,
            "aux_loss_enabled": False,
            "_metrics": {"train": collections.defaultdict(list)},
            "_total_train_tokens": 0,
            "_tp_size": 1,
            **attributes,
        }
    )
