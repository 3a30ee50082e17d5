"""KTO against an implementation in plain Python, from the paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from sequence_losses import (
    FP64,
    assert_agrees,
    assert_finite,
    mean,
    random_log_probs,
    random_mask,
    sigmoid,
    trl_self,
    value_and_grad,
)

from liger_trainer.kernels.losses.kto import LOSS_TYPES, KTOLoss, mismatched_kl

B, T = 5, 6
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def make_batch():
    log_probs, mask = random_log_probs(B, T), random_mask(B, T)
    ref = (log_probs + torch.randn(B, T)).masked_fill(~mask, 0.0).sum(-1)
    desirable = torch.tensor([True, False, False, True, False])
    return log_probs, mask, desirable, ref


def kl_of(loss: KTOLoss):
    return torch.tensor(0.37, dtype=torch.float64) if loss.needs_kl else None


def slow_kto(log_probs, mask, desirable, ref, loss: KTOLoss, z: float):
    values = []
    for b, row in enumerate(log_probs):
        r = sum(x for x, m in zip(row, mask[b], strict=True) if m) - float(ref[b])
        if desirable[b]:  # lambda_y - v(x, y), equations 7 and 8
            weight = loss.desirable_weight
            values.append(weight - weight * sigmoid(loss.beta * (r - z)))
        else:
            weight = loss.undesirable_weight
            values.append(weight - weight * sigmoid(loss.beta * (z - r)))
    return mean(values)


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["even", "weighted"])
def test_loss_is_the_papers(name, weights):
    log_probs, mask, desirable, ref = make_batch()
    loss = KTOLoss(0.7, name, **weights)
    kl = kl_of(loss)
    assert_agrees(
        lambda x: loss(x, mask, desirable, ref, kl).loss.mean(),
        lambda x: slow_kto(x, mask, desirable, ref, loss, 0.37 if loss.needs_kl else 0.0),
        log_probs,
    )


@pytest.mark.parametrize("kinds", [[True] * B, [False] * B], ids=["all desirable", "none"])
def test_one_kind_alone(kinds):
    log_probs, mask, _, ref = make_batch()
    loss = KTOLoss(0.7, **WEIGHTS)
    desirable = torch.tensor(kinds)
    assert_agrees(
        lambda x: loss(x, mask, desirable, ref, kl_of(loss)).loss.mean(),
        lambda x: slow_kto(x, mask, desirable, ref, loss, 0.37),
        log_probs,
    )


def test_rewards_and_log_probs():
    log_probs, mask, desirable, ref = make_batch()
    out = KTOLoss(0.7, **WEIGHTS)(
        log_probs.requires_grad_(), mask, desirable, ref, torch.tensor(0.2)
    )
    sums = log_probs.detach().masked_fill(~mask, 0.0).sum(-1)
    torch.testing.assert_close(out.rewards, 0.7 * (sums - ref), **FP64)
    torch.testing.assert_close(out.log_probs, sums, **FP64)
    assert not out.rewards.requires_grad
    assert not out.log_probs.requires_grad


def test_mismatched_kl_is_a_mean_bounded_after_the_processes_met():
    log_probs, mask, _, ref = make_batch()
    sums = log_probs.masked_fill(~mask, 0.0).sum(-1)
    ref = sums - torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    kl = mismatched_kl(log_probs.requires_grad_(), mask, ref)
    assert kl.item() == pytest.approx(2.5 / 5)
    assert kl.shape == ()
    assert not kl.requires_grad
    assert mismatched_kl(log_probs, mask, ref + 1).item() == 0
    # The other process has -1.5: the mean of both is below 0, each bounded by itself is not.
    both = mismatched_kl(log_probs, mask, ref, reduce=lambda z: (z - 1.5) / 2)
    assert both.item() == 0


def test_kl_is_a_constant():
    log_probs, mask, desirable, ref = make_batch()
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = KTOLoss()(log_probs.requires_grad_(), mask, desirable, ref.requires_grad_(), kl).loss
    loss.sum().backward()
    assert kl.grad is None
    assert ref.grad is None
    assert log_probs.grad.any()


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_completions_one_at_a_time(name):
    log_probs, *rest = make_batch()
    loss = KTOLoss(0.7, name, **WEIGHTS)
    kl = kl_of(loss)
    assert not loss.couples_groups

    def apart(x):
        return torch.cat(
            [loss(*(a[b : b + 1] for a in (x, *rest)), kl).loss for b in range(B)]
        ).mean()

    together = value_and_grad(lambda x: loss(x, *rest, kl).loss.mean(), log_probs)
    for got, expected in zip(value_and_grad(apart, log_probs), together, strict=True):
        torch.testing.assert_close(got, expected, **FP64)


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("ratio", [50.0, -50.0, 1e4, -1e4])
def test_extremes_are_finite_in_fp32(name, ratio):
    log_probs, mask, desirable, _ = make_batch()
    mask[0] = False
    log_probs = log_probs.float().masked_fill(~mask, float("nan"))  # never read
    ref = log_probs.masked_fill(~mask, 0.0).sum(-1) - ratio
    loss = KTOLoss(1.0, name)
    value, grad = value_and_grad(
        lambda x: loss(x, mask, desirable, ref, kl_of(loss)).loss.mean(), log_probs
    )
    assert_finite(value, grad, mask)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["even", "weighted"])
def test_trl_computes_the_same(name, weights):
    trl = pytest.importorskip("trl")
    log_probs, mask, desirable, ref = make_batch()
    loss = KTOLoss(0.7, name, **weights)
    kl_log_probs = random_log_probs(B, T)
    ref_kl = kl_log_probs.sum(-1) - 0.3
    kl_mask = torch.ones(B, T, dtype=torch.bool)
    kl = mismatched_kl(kl_log_probs, kl_mask, ref_kl) if loss.needs_kl else None
    first = torch.zeros(B, 1, dtype=torch.long)
    whole = torch.cat([first, mask.long()], 1)
    self = trl_self(
        loss,
        precompute_ref_logps=True,
        calculate_KL=loss.needs_kl,
        _compute_kl_logps=lambda *_: kl_log_probs.sum(-1),
    )

    def theirs(x):
        outputs = SimpleNamespace(
            log_probs=x.masked_fill(~mask, 0.0), entropy=x.detach(), mean_logits=x.detach()
        )
        inputs = {"label": desirable, "input_ids": whole, "attention_mask": whole,
                  "completion_mask": whole, "ref_logps": ref, "ref_KL_logps": ref_kl}  # fmt: skip
        return trl.KTOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)

    expected = value_and_grad(theirs, log_probs)
    ours = value_and_grad(lambda x: loss(x, mask, desirable, ref, kl).loss.mean(), log_probs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, **FP64)
    metrics, out = self._metrics["train"], loss(log_probs, mask, desirable, ref, kl)
    assert metrics["kl"][0] == pytest.approx(0.3 if loss.needs_kl else 0.0)
    assert metrics["rewards/chosen"][0] == pytest.approx(out.rewards[desirable].mean().item())
    assert metrics["rewards/rejected"][0] == pytest.approx(out.rewards[~desirable].mean().item())


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_never_reads_the_device(name):
    """A tensor on `meta` has no values: whatever asks for one raises."""
    log_probs, mask, desirable, ref = (x.to("meta") for x in make_batch())
    loss = KTOLoss(0.7, name)
    kl = mismatched_kl(log_probs, mask, ref) if loss.needs_kl else None
    value_and_grad(lambda x: loss(x, mask, desirable, ref, kl).loss.sum(), log_probs)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()  # else one test's recompilations count against the next
    batch, loss = make_batch(), KTOLoss(0.7, name, **WEIGHTS)
    compiled = torch.compile(lambda *a: loss(*a).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch, kl_of(loss)), loss(*batch, kl_of(loss)).loss)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({"beta": b}, ["beta"]) for b in (0.0, -0.1, math.nan)),
        ({"desirable_weight": -1.0}, ["desirable_weight", "-1.0"]),
        ({"undesirable_weight": math.inf}, ["undesirable_weight"]),
        ({"loss_type": "bco"}, ["bco", "apo_zero_unpaired"]),
    ],
)
def test_bad_options_raise(given, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the words are checked below
        KTOLoss(**given)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input_raises():
    log_probs, mask, desirable, ref = make_batch()
    kl = torch.tensor(0.1)
    for match, loss, args in [
        ("desirable.bool", KTOLoss(), (log_probs, mask, desirable.long(), ref, kl)),
        ("kl is needed", KTOLoss(), (log_probs, mask, desirable, ref)),
        ("does not read kl", KTOLoss(0.1, LOSS_TYPES[1]), (log_probs, mask, desirable, ref, kl)),
        ("kl must have shape", KTOLoss(), (log_probs, mask, desirable, ref, kl[None])),
        ("ref_log_probs must", KTOLoss(), (log_probs, mask, desirable, ref[1:], kl)),
        (r"\[B, T\]", KTOLoss(), (log_probs[0], mask[0], desirable, ref, kl)),
    ]:
        with pytest.raises(ValueError, match=match):
            loss(*args)
