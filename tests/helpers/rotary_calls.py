"""A module that calls a rotary function, and what it is called with."""

from __future__ import annotations

import functools

import torch
from torch import nn

from liger_trainer import inject
from liger_trainer.report import InjectionReport

CALLS = []


def attention(function) -> tuple[nn.Module, InjectionReport]:
    """A swapped module that calls `function` as it is called; CALLS counts the original's calls."""
    scope = {"rotary": counted(function)}
    exec("def forward(self, *args, **kwargs):\n    return rotary(*args, **kwargs)", scope)
    cls = type("Attention", (nn.Module,), {"forward": scope["forward"]})
    model = nn.Sequential(cls())
    report = inject(model)
    CALLS.clear()
    return model[0], report


def counted(function):
    @functools.wraps(function)
    def counting(*args, **kwargs):
        CALLS.append(function)
        return function(*args, **kwargs)

    return counting


def states(heads=1, length=5):
    torch.manual_seed(0)
    q, k = (torch.randn(2, length, n, 16) for n in (4, 2))
    cos, sin = torch.randn(2, length, 16), torch.randn(2, length, 16)
    if heads == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q, k, cos, sin
