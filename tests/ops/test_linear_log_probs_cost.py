"""What `linear_log_probs` costs, and the promises that make it cheaper."""

import itertools

import heads
import pytest
import torch
from heads import (
    TOKENS,
    VOCAB,
    WIDTH,
    Products,
    assert_all_close,
    every_rows,
    leaves_of,
    problem,
)
from oracle import assert_matches
from shapes import Shapes

from liger_trainer.kernels.linear.log_probs import (
    WEIGHTINGS,
    linear_log_probs,
    linear_log_probs_reference,
)

small_first_part = heads.small_first_part  # a fixture


def products(device, rows, *, weighting=None, frozen=False, ignored=3, grad=True):
    tensors, labels = problem(device, ignored=ignored)
    hidden = tensors["hidden"].requires_grad_(grad)
    weight = tensors["weight"].requires_grad_(grad and not frozen)
    with Products(VOCAB) as counter:
        scores = linear_log_probs(hidden, weight, labels, weighting=weighting, max_rows=rows)
        if grad:
            scores.log_probs.sum().backward()
    return counter.of(int((labels != -100).sum()), WIDTH)


def test_plain_torch_pays_three_products(device):
    tensors, labels = problem(device, ignored=0)
    leaves = leaves_of(tensors)
    with Products(VOCAB) as counter:
        linear_log_probs_reference(
            [leaves["hidden"]], [leaves["weight"]], labels, leaves["bias"]
        ).log_probs.sum().backward()
    assert counter.of(TOKENS, WIDTH) == 3


@pytest.mark.parametrize("ignored", [0, 2, 3])
def test_products(device, ignored):
    """Tokens without label are in none of them."""
    labeled = TOKENS - (len(range(0, TOKENS, ignored)) if ignored else 0)
    fits, less = labeled, 3
    again = (labeled - less) / labeled  # of the logits do not fit, and are computed twice
    for frozen in (False, True):
        full = 2 if frozen else 3
        count = {"frozen": frozen, "ignored": ignored}
        assert products(device, fits, **count) == full
        assert products(device, less, **count) == pytest.approx(full + again)
        for weighting, rows in itertools.product(WEIGHTINGS, (fits, less)):
            assert products(device, rows, weighting=weighting, **count) == pytest.approx(full)
    for rows in (fits, less):
        assert products(device, rows, ignored=ignored, grad=False) == pytest.approx(1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_never_builds_all_logits(device, weighting, grad):
    tensors, labels = problem(device, ignored=0)
    leaves = {name: t.requires_grad_(grad) for name, t in tensors.items()}
    with Shapes() as shapes:
        scores = linear_log_probs(labels=labels, weighting=weighting, max_rows=5, **leaves)
        if grad:
            scores.log_probs.sum().backward()
    assert 0 < shapes.largest(VOCAB) <= 5


@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_frozen_head_allocates_no_weight_gradient(device, weighting):
    tensors, labels = problem(device)
    hidden = tensors["hidden"].requires_grad_()
    with Shapes() as shapes:
        linear_log_probs(
            hidden, tensors["weight"], labels, weighting=weighting, max_rows=5
        ).log_probs.sum().backward()
    assert hidden.grad.any()
    assert torch.Size((VOCAB, WIDTH)) not in shapes.seen


def promised_loss(scores, weighting, factor=1.0):
    """-sum of log p, or of sg(p) log p, times `factor`."""
    log_probs = scores.log_probs
    weight = log_probs.detach().exp() if weighting == "probability" else 1.0
    return -(factor * weight * log_probs).sum()


@every_rows
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(1 / 3, torch.float32), (1 / 3, torch.bfloat16), (-1e4, torch.float32), (0.0, torch.float32)],
)
def test_kept_promise_changes_nothing(place, rows, weighting, factor, dtype):
    tensors, labels = problem(place, dtype)

    def run(hidden, weight, bias, reference=False):
        if reference:
            scores = linear_log_probs_reference([hidden], [weight], labels, bias)
        else:
            scores = linear_log_probs(
                hidden, weight, labels, bias, weighting=weighting, max_rows=rows
            )
        return promised_loss(scores, weighting, factor)

    assert_matches(run, lambda **tensors: run(reference=True, **tensors), tensors, factor=3.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_declared_gradients_are_accumulated(place, weighting):
    """Two micro-batches with factors of their own, into one weight."""
    tensors, _ = problem(place)
    results = []
    for promise in (weighting, None):
        leaves = leaves_of(tensors)
        torch.manual_seed(1)
        for factor in (0.5, 2.0):
            labels = torch.randint(0, VOCAB, (TOKENS,)).to(place)
            scores = linear_log_probs(labels=labels, weighting=promise, max_rows=5, **leaves)
            promised_loss(scores, weighting, factor).backward()
        results.append([leaf.grad for leaf in leaves.values()])
    assert_all_close(*results)


def one_token_counts_twice(scores):
    return scores.log_probs.sum() + scores.log_probs[1]


def one_token_is_left_out(scores):
    return scores.log_probs.sum() - scores.log_probs[1]


def entropy_bonus(scores):
    return scores.log_probs.sum() + scores.entropy.sum()


def normaliser_penalty(scores):
    return scores.log_probs.sum() + scores.log_sum_exp.square().sum()


@every_rows
@pytest.mark.parametrize(
    ("weighting", "loss"),
    [
        ("uniform", one_token_counts_twice),
        ("uniform", one_token_is_left_out),
        ("uniform", entropy_bonus),
        ("uniform", normaliser_penalty),
        ("uniform", lambda scores: promised_loss(scores, "probability")),
        ("probability", lambda scores: promised_loss(scores, "uniform")),
    ],
)
def test_broken_promise_makes_every_gradient_nan(place, rows, weighting, loss):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors)
    scores = linear_log_probs(
        labels=labels,
        outputs=("entropy", "log_sum_exp"),
        weighting=weighting,
        max_rows=rows,
        **leaves,
    )
    dhidden, *dhead = torch.autograd.grad(loss(scores), leaves.values())
    assert all(grad.isnan().all() for grad in (dhidden[labels != -100], *dhead))
