"""Linear heads under autocast: they compute in the dtype of the hidden states, as without it."""

import heads
import pytest
import torch
from heads import leaves_of, problem

from liger_trainer.kernels.linear import (
    linear_cross_entropy,
    linear_divergence,
    linear_log_prob_loss,
    linear_log_probs,
)

small_first_part = heads.small_first_part  # a fixture


def divergence(hidden, weight, labels, bias, reduction):
    teacher = hidden.detach().cos(), weight.detach().sin()
    mask = labels != -100
    return linear_divergence(hidden, weight, *teacher, mask, bias, reduction=reduction, max_rows=5)[
        0
    ]


def log_prob_loss(hidden, weight, labels, bias):
    def loss(scores, mask, groups):
        return scores.log_probs.sin().sum((1, 2))

    return linear_log_prob_loss(hidden[None], weight, labels[None], loss, bias, max_rows=5)[0]


def cross_entropy(hidden, weight, labels, bias, reduction):
    return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, max_rows=5)


CALLS = {
    "cross entropy, mean": lambda *x: cross_entropy(*x, "mean"),
    "cross entropy, none": lambda *x: cross_entropy(*x, "none"),
    "divergence, mean": lambda *x: divergence(*x, "mean"),
    "divergence, none": lambda *x: divergence(*x, "none"),
    "log probs": lambda *x: linear_log_probs(*x, max_rows=5).log_probs.sin(),
    "log probs, declared": lambda *x: (
        linear_log_probs(*x, max_rows=5, weighting="uniform").log_probs
    ),
    "log prob loss": log_prob_loss,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("ignored", "weight_dtype"), [(0, torch.bfloat16), (3, torch.bfloat16), (3, torch.float32)]
)
def test_autocast_changes_nothing(place, call, ignored, weight_dtype):
    tensors, labels = problem(place, ignored=ignored)
    tensors["weight"] = tensors["weight"].to(weight_dtype)
    results = []
    for enabled in (False, True):
        leaves = leaves_of(tensors)
        with torch.autocast(place, torch.bfloat16, enabled=enabled):
            value = call(leaves["hidden"], leaves["weight"], labels, leaves["bias"])
            value.sum().backward()
        results.append([value, *(leaf.grad for leaf in leaves.values())])
    torch.testing.assert_close(*results, rtol=0, atol=0)
