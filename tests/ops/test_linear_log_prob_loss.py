import heads
import pytest
import torch
from group_losses import (
    BATCH,
    GROUPS,
    LENGTH,
    every_grouping,
    every_rows,
    preference,
    problem,
    unfused,
    with_entropy,
)
from heads import VOCAB, assert_all_close, leaves_of
from oracle import assert_matches

from liger_trainer.kernels.linear.log_prob_loss import linear_log_prob_loss, pairs
from liger_trainer.kernels.linear.log_probs import linear_log_probs_reference
from liger_trainer.kernels.logits.scores import EXTRA, ScoreOptions

small_first_part = heads.small_first_part  # a fixture


def compare(tensors, labels, loss=preference, rows=32, factor=3.0, **kwargs):
    """Value and gradients of the fused loss against fp64."""
    assert_matches(
        lambda **x: linear_log_prob_loss(labels=labels, loss=loss, max_rows=rows, **x, **kwargs)[0],
        lambda **x: unfused(labels=labels, loss=loss, **x, **kwargs)[0],
        tensors,
        factor=factor,
    )


@every_rows
@every_grouping
def test_matches_fp64(place, rows, groups):
    compare(*problem(place, torch.bfloat16), rows=rows, groups=groups)


@every_rows
def test_fp32_matches_fp64(place, rows):
    compare(*problem(place), rows=rows, groups=GROUPS["pairs"])


@every_rows
@every_grouping
def test_entropy_in_the_loss(place, rows, groups):
    options = ScoreOptions(scale=0.5, softcap=4.0, temperature=1.3)
    tensors, labels = problem(place)
    compare(
        tensors, labels, with_entropy, rows=rows, groups=groups, options=options,
        outputs=("entropy", "log_sum_exp"), reduction="sum",
    )  # fmt: skip


@every_rows
@pytest.mark.parametrize("grad", [False, True])
def test_scores_are_those_of_all_tokens_and_detached(place, rows, grad):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors) if grad else tensors
    loss, scores = linear_log_prob_loss(
        labels=labels, loss=preference, groups=pairs(BATCH), outputs=EXTRA, max_rows=rows, **leaves
    )
    expected, expected_scores = unfused(
        labels=labels, loss=preference, groups=pairs(BATCH), outputs=EXTRA, **tensors
    )
    torch.testing.assert_close(loss.detach(), expected)
    assert loss.requires_grad == grad
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    for name, got in scores._asdict().items():
        assert not got.requires_grad
        torch.testing.assert_close(got, getattr(expected_scores, name), msg=name)
    _, scores = linear_log_prob_loss(labels=labels, loss=preference, **leaves)
    assert [name for name, x in scores._asdict().items() if x is not None] == ["log_probs"]


@every_rows
@pytest.mark.parametrize(
    "labeled",
    [(5, 0, 1, 3), (0, 0, 4, 2), (2, 5, 0, 0), (1, 1, 1, 1), (0, 0, 0, 1), (0, 0, 0, 0)],
    ids=str,
)
def test_uneven_groups_and_groups_without_labels(place, rows, labeled):
    """Also a group without labels has a loss: here that of its margin."""
    tensors, labels = problem(place, labeled=labeled)
    for groups in GROUPS.values():
        leaves = leaves_of(tensors)
        calls = {"labels": labels, "loss": preference, "groups": groups}
        loss, scores = linear_log_prob_loss(max_rows=rows, **calls, **leaves)
        with torch.no_grad():
            alone, _ = linear_log_prob_loss(max_rows=rows, **calls, **leaves)
        grads = torch.autograd.grad(loss, leaves.values())
        expected, expected_scores = unfused(**calls, **leaves)
        assert expected.item() > 0
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(alone, expected.detach())
        torch.testing.assert_close(scores.log_probs, expected_scores.log_probs.detach())
        assert_all_close(grads, torch.autograd.grad(expected, leaves.values()))


def test_every_group_is_evaluated_once_in_order_with_its_own_members(place):
    tensors, labels = problem(place)
    groups = torch.tensor([[3, 1], [0, 2]])
    for rows, expected in [(32, [[0, 1]]), (9, [[0], [1]]), (3, [[0], [1]])]:
        seen = []

        def loss(scores, mask, index, seen=seen):
            seen.append(index.tolist())
            assert torch.equal(mask, (labels != -100)[groups.to(place)][index])
            assert scores.log_probs.shape == mask.shape
            assert not scores.log_probs[~mask].any()
            assert scores.log_probs[mask].all()
            return scores.log_probs.sum((1, 2))

        leaves = leaves_of(tensors)
        linear_log_prob_loss(labels=labels, loss=loss, groups=groups, max_rows=rows, **leaves)
        assert seen == expected


def test_reduction(place):
    tensors, labels = problem(place)
    for groups in GROUPS.values():
        total, mean = (
            linear_log_prob_loss(
                labels=labels, loss=preference, groups=groups, reduction=reduction, **tensors
            )[0]
            for reduction in ("sum", "mean")
        )
        torch.testing.assert_close(total, mean * (BATCH if groups is None else len(groups)))


@every_rows
def test_the_incoming_gradient_scales_all_gradients(place, rows):
    tensors, labels = problem(place)

    def squared(fn, **tensors):
        return fn(labels=labels, loss=preference, **tensors)[0].square()

    def fused(**kwargs):
        return linear_log_prob_loss(max_rows=rows, **kwargs)

    assert_matches(
        lambda **x: squared(fused, **x), lambda **x: squared(unfused, **x), tensors, factor=3.0
    )


@every_rows
def test_backward_twice_gives_the_same(place, rows):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors)
    loss, _ = linear_log_prob_loss(labels=labels, loss=preference, max_rows=rows, **leaves)
    first = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    second = torch.autograd.grad(loss, leaves.values())
    assert all(x.any() for x in first)
    assert all(map(torch.equal, first, second))


@every_rows
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_only_what_requires_a_gradient_gets_one(place, rows, wanted):
    tensors, labels = problem(place)

    def gradient_of(names):
        leaves = leaves_of(tensors)
        for name in set(leaves) - set(names):
            leaves[name].requires_grad_(False)
        linear_log_prob_loss(labels=labels, loss=preference, max_rows=rows, **leaves)[0].backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    got, everything = gradient_of(wanted), gradient_of(tensors)
    for name, grad in got.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            assert grad.any()
            torch.testing.assert_close(grad, everything[name])


@every_rows
def test_low_rank_adapter_is_a_second_term(place, rows):
    tensors, labels = problem(place)
    low, adapter = torch.randn(BATCH, LENGTH, 3), torch.randn(VOCAB, 3)
    tensors |= {"low": low.to(place), "adapter": adapter.to(place)}

    def fused(hidden, weight, bias, low, adapter):
        return linear_log_prob_loss(
            [hidden, low], [weight, adapter], labels, preference, bias, max_rows=rows
        )[0]

    def reference(hidden, weight, bias, low, adapter):
        scores = linear_log_probs_reference(
            [hidden.flatten(0, 1), low.flatten(0, 1)], [weight, adapter], labels.flatten(), bias
        ).map(lambda x: x.view(BATCH, 1, LENGTH))
        index = torch.arange(BATCH, device=place)
        return preference(scores, (labels != -100).unsqueeze(1), index).mean()

    assert_matches(fused, reference, tensors, factor=3.0)


@every_rows
def test_a_loss_that_ignores_log_probs_has_zero_gradients(place, rows):
    tensors, labels = problem(place)
    own = torch.tensor(2.0, device=place, requires_grad=True)
    for loss in (
        lambda scores, mask, groups: mask.sum((1, 2)).float(),
        lambda scores, mask, groups: own * mask.sum((1, 2)),
        lambda scores, mask, groups: scores.log_probs.detach().sum((1, 2)),
    ):
        leaves = leaves_of(tensors)
        linear_log_prob_loss(labels=labels, loss=loss, max_rows=rows, **leaves)[0].backward()
        for leaf in leaves.values():
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert own.grad is None


@every_rows
def test_a_loss_of_the_entropy_alone(place, rows):
    tensors, labels = problem(place)
    compare(
        tensors, labels, lambda scores, mask, groups: scores.entropy.sum((1, 2)), rows=rows,
        outputs=("entropy",),
    )  # fmt: skip


@pytest.mark.parametrize("rows", [6400, 128, 64, 30])
def test_16_bit_weight_gradient_is_as_precise_as_torchs(device, rows):
    """However many workspaces: each must not cost a rounding of the sum."""
    tensors, labels = problem(device, torch.bfloat16, labeled=(64,) * 100, length=64)
    tensors["weight"] = tensors["weight"] * 0.1
    compare(
        tensors, labels, lambda scores, mask, groups: scores.log_probs.sum((1, 2)), rows=rows,
        factor=2.0, reduction="sum",
    )  # fmt: skip


@every_rows
def test_fp32_parameters_with_16_bit_hidden_get_fp32_gradients(place, rows):
    tensors, labels = problem(place, torch.bfloat16)
    leaves = leaves_of({**tensors, "weight": tensors["weight"].float()})
    linear_log_prob_loss(labels=labels, loss=preference, max_rows=rows, **leaves)[0].backward()
    exact = leaves_of({name: t.double() for name, t in tensors.items()})
    unfused(labels=labels, loss=preference, **exact)[0].backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 0.03, name
