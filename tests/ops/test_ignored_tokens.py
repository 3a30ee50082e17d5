"""Ignored tokens get a gradient of exactly 0, whatever arrives; a batch without any is harmless."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear.divergence import linear_divergence
from liger_trainer.kernels.linear.log_prob_loss import linear_log_prob_loss
from liger_trainer.kernels.linear.log_probs import linear_log_probs
from liger_trainer.kernels.logits.cross_entropy import cross_entropy

B, T, H, V = 2, 6, 8, 33


def _scores(x, w, b, y, **kwargs):
    return linear_log_probs(x, w, y, b, **kwargs).log_probs.sum()


LOSSES = {
    "logits": lambda x, w, b, y: cross_entropy(F.linear(x, w, b), y, reduction="sum"),
    "cross entropy": lambda x, w, b, y: linear_cross_entropy(x, w, y, b, reduction="sum"),
    "several chunks": lambda x, w, b, y: linear_cross_entropy(
        x, w, y, b, reduction="sum", max_rows=3
    ),
    "per token": lambda x, w, b, y: linear_cross_entropy(x, w, y, b, reduction="none").sum(),
    "log-probabilities": _scores,
    "promised": lambda x, w, b, y: _scores(x, w, b, y, weighting="uniform"),
    "groups": lambda x, w, b, y: linear_log_prob_loss(
        x, w, y, lambda scores, mask, i: scores.log_probs.sum((1, 2)), b, reduction="sum"
    )[0],
    "divergence": lambda x, w, b, y: linear_divergence(
        x, w, x.detach() + 1, w.detach(), y != -100, b, reduction="sum"
    )[0],
    "divergence per token": lambda x, w, b, y: linear_divergence(
        x, w, x.detach() + 1, w.detach(), y != -100, b, reduction="none"
    )[0].sum(),
}


def leaves(place):
    torch.manual_seed(0)
    shapes = [(B, T, H), (V, H), (V,)]
    return [torch.randn(s).to(place).requires_grad_() for s in shapes]


@pytest.mark.parametrize("g", [math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_batch_without_labels_leaves_no_trace(place, loss, g):
    x, w, b = leaves(place)
    y = torch.full((B, T), -100, device=place)
    (loss(x, w, b, y) * g).backward()
    for leaf in (x, w, b):
        assert leaf.grad is None or torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("g", [math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_rows_without_label_stay_zero_under_a_broken_gradient(place, loss, g):
    x, w, b = leaves(place)
    y = torch.randint(0, V, (B, T), device=place)
    y[:, ::2] = -100
    (loss(x, w, b, y) * g).backward()
    assert torch.equal(x.grad[:, ::2], torch.zeros_like(x.grad[:, ::2]))
    assert not x.grad[:, 1::2].isfinite().all()


def test_the_mean_by_hand_over_no_label(place):
    x, w, b = leaves(place)
    y = torch.full((B, T), -100, device=place)
    loss = linear_cross_entropy(x, w, y, b, reduction="sum") / (y != -100).sum()
    loss.backward()
    assert loss.isnan()
    assert not any(leaf.grad.any() for leaf in (x, w, b))


@pytest.mark.parametrize("weighted", [False, True])
def test_frozen_head_with_a_loss_per_token(place, weighted):
    x, w, b = leaves(place)
    w, b = w.detach(), b.detach()
    y = torch.randint(0, V, (B, T), device=place)
    y[0, 2] = -100
    weight = torch.rand(B, T).to(place).requires_grad_() if weighted else None
    if weighted:
        loss = linear_cross_entropy(x, w, y, b, token_weight=weight, reduction="sum")
    else:
        loss = linear_cross_entropy(x, w, y, b, reduction="none").sum()
    inputs = [x, weight] if weighted else [x]
    got = torch.autograd.grad(loss, inputs)
    plain = F.cross_entropy(F.linear(x, w, b).flatten(0, 1), y.flatten(), reduction="none")
    plain = plain * weight.flatten() if weighted else plain
    for a, e in zip(got, torch.autograd.grad(plain.sum(), inputs), strict=True):
        torch.testing.assert_close(a, e)


def test_a_nan_in_the_weight_of_an_ignored_token(place):
    x, w, b = leaves(place)
    y = torch.randint(0, V, (B, T), device=place)
    y[0] = -100
    weight = torch.ones(B, T, device=place).masked_fill(y == -100, math.nan)
    loss = linear_cross_entropy(x, w, y, b, token_weight=weight, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in (x, w, b))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_second_derivative_raises_also_from_a_constant(place, loss):
    x, w, b = leaves(place)
    y = torch.randint(0, V, (B, T), device=place)
    if place == "cpu" and loss is LOSSES["logits"]:
        pytest.skip("the torch path of the plain cross entropy is differentiable twice")
    value = loss(x, w, b, y)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_precision(place, offset):
    torch.manual_seed(0)
    hidden = torch.randn(16, H, device=place)
    hidden[:, 0] = 1.0
    weight = torch.randn(V, H, device=place)
    weight[:, 0] = 0.0
    y = torch.randint(0, V, (16,), device=place)
    grads = []
    for shift in (0.0, offset):
        moved = weight.clone()
        moved[:, 0] += shift
        x = (hidden / 1.0).requires_grad_()
        loss = cross_entropy(F.linear(x, weight) + shift, y, reduction="sum")
        loss.backward()
        linear = linear_cross_entropy(x, moved, y, reduction="sum")
        grads.append(x.grad)
        torch.testing.assert_close(linear, loss, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_one_class(place, loss):
    """Every row's loss is zero, and so is each gradient."""
    torch.manual_seed(0)
    leaves = [torch.randn(s).to(place).requires_grad_() for s in [(B, T, H), (1, H), (1,)]]
    y = torch.zeros(B, T, dtype=torch.long, device=place)
    y[:, ::2] = -100
    value = loss(*leaves, y)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.zeros_like(value))
    for leaf in leaves:
        assert leaf.grad is None or torch.equal(leaf.grad, torch.zeros_like(leaf))
