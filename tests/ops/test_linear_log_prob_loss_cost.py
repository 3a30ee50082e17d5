"""What `linear_log_prob_loss` costs, and what it refuses."""

import heads
import pytest
import torch
from group_losses import (
    BATCH,
    GROUPS,
    LABELED,
    LENGTH,
    ROWS,
    every_grouping,
    preference,
    problem,
    with_entropy,
)
from heads import FIRST, VOCAB, WIDTH, Products, leaves_of
from shapes import Shapes

from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.kernels.linear.log_prob_loss import linear_log_prob_loss, pairs

small_first_part = heads.small_first_part  # a fixture


def products(device, rows, groups=None, *, frozen=False, grad=True):
    tensors, labels = problem(device)
    hidden = tensors["hidden"].requires_grad_(grad)
    weight = tensors["weight"].requires_grad_(grad and not frozen)
    with Products(VOCAB) as counter:
        loss, _ = linear_log_prob_loss(
            hidden, weight, labels, preference, groups=groups, max_rows=rows
        )
        if grad:
            loss.backward()
    return counter.of(sum(LABELED), WIDTH)


def test_products(device):
    for groups in GROUPS.values():
        assert products(device, 32, groups) == 3
        assert products(device, 32, groups, frozen=True) == 2
        for rows in ROWS.values():
            assert products(device, rows, groups, grad=False) == 1
    # Workspaces of 9 rows hold two sequences, or one pair (of the sequences 0, 2 and 1, 3).
    assert products(device, 9) == 3
    assert products(device, 8, pairs(BATCH)) == pytest.approx(3 + (10 - 2) / 18)
    # A group of 18 rows has all but its last workspace computed twice.
    for rows, last in [(9, 9), (7, 4), (5, 3), (17, 1)]:
        again = (18 - last) / 18
        assert products(device, rows, GROUPS["batch"]) == pytest.approx(3 + again)
        assert products(device, rows, GROUPS["batch"], frozen=True) == pytest.approx(2 + again)


@every_grouping
@pytest.mark.parametrize("grad", [False, True])
def test_never_builds_all_logits(device, grad, groups):
    tensors, labels = problem(device)
    leaves = {name: t.requires_grad_(grad) for name, t in tensors.items()}
    with Shapes() as shapes:
        loss, _ = linear_log_prob_loss(
            labels=labels, loss=preference, groups=groups, max_rows=5, **leaves
        )
        if grad:
            loss.backward()
    assert 0 < shapes.largest(VOCAB) <= 5


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores, mask, groups: scores.log_probs.sum(),
        lambda scores, mask, groups: scores.log_probs.sum(2),
        lambda scores, mask, groups: scores.log_probs,
        lambda scores, mask, groups: scores.log_probs.sum((1, 2))[:-1],
    ],
    ids=["scalar", "one for each sequence", "one for each token", "one too few"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_refuses_a_loss_of_the_wrong_shape(place, loss, grad):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors) if grad else tensors
    with pytest.raises(ValueError, match=r"must have shape \(2,\), one value for each, got"):
        linear_log_prob_loss(labels=labels, loss=loss, groups=pairs(BATCH), **leaves)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.tensor([[0, 1], [2, 2]]), "each of the 4 sequences exactly once"),
        (torch.tensor([[0, 1], [2, 4]]), "each of the 4 sequences exactly once"),
        (torch.tensor([[0, 1], [2, -1]]), "each of the 4 sequences exactly once"),
        (torch.tensor([[0, 1]]), "each of the 4 sequences exactly once"),
        (torch.tensor([0, 1, 2, 3]), "int64 tensor"),
        (torch.tensor([[0.0, 1.0, 2.0, 3.0]]), "int64 tensor"),
    ],
    ids=["twice", "too large", "negative", "missing", "flat", "floats"],
)
def test_refuses_groups_that_are_no_partition(groups, message):
    tensors, labels = problem("cpu")
    with pytest.raises(ValueError, match=message):
        linear_log_prob_loss(labels=labels, loss=preference, groups=groups, **tensors)


def test_pairs_are_of_the_first_half_with_the_second():
    assert pairs(6).tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="5 sequences cannot be paired"):
        pairs(5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", [1, LENGTH], ids=["less than the first part", "more"])
def test_labels_out_of_range_raise(place, grad, length):
    tensors, labels = problem(place, labeled=(length, length), length=length)
    assert (labels.numel() <= FIRST) == (length == 1)
    labels[1, 0] = VOCAB
    leaves = leaves_of(tensors) if grad else tensors
    with pytest.raises(ValueError, match="1 labels lie outside"):
        linear_log_prob_loss(labels=labels, loss=preference, **leaves)


def test_refuses_arguments_that_do_not_fit():
    tensors, labels = problem("cpu")
    hidden, weight, bias = tensors.values()
    with pytest.raises(ValueError, match=r"labels must be \[B, T\]"):
        linear_log_prob_loss(hidden.flatten(0, 1), weight, labels.flatten(), preference)
    with pytest.raises(ValueError, match="labels must have shape"):
        linear_log_prob_loss(hidden, weight, labels[:, :-1], preference)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        linear_log_prob_loss(hidden, weight, labels, preference, reduction="none")
    with pytest.raises(ValueError, match="unknown outputs perplexity"):
        linear_log_prob_loss(hidden, weight, labels, preference, outputs=("perplexity",))
    with pytest.raises(ValueError, match="bias"):
        linear_log_prob_loss(hidden, weight, labels, preference, bias[:-1])


def test_an_empty_batch_has_loss_zero(place):
    tensors, labels = problem(place)
    leaves = leaves_of({**tensors, "hidden": tensors["hidden"][:0]})
    loss, scores = linear_log_prob_loss(labels=labels[:0], loss=preference, **leaves)
    loss.backward()
    assert loss.item() == 0
    assert scores.log_probs.shape == (0, LENGTH)
    assert not any(leaf.grad.any() for leaf in leaves.values())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 300], ids=["groups fit", "groups do not fit"])
def test_host_never_waits_for_an_idle_device(rows, monkeypatch):
    """No synchronizing call; the counts arrive by event, behind queued work."""
    monkeypatch.setattr(linear_head, "FIRST_ROWS", 256)
    batch, length, width, vocab = 16, 512, 512, 32000
    hidden = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (batch, length), device="cuda")
    labels[:, ::3] = -100

    def step():
        loss, _ = linear_log_prob_loss(
            hidden.requires_grad_(), weight.requires_grad_(), labels, with_entropy,
            groups=pairs(batch), outputs=("entropy", "log_sum_exp"), max_rows=rows,
        )  # fmt: skip
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
