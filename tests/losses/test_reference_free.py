"""ORPO, CPO and SimPO against implementations in plain Python, from the papers."""

import math

import pytest
import torch
from sequence_losses import (
    FP64,
    assert_agrees,
    assert_finite,
    mean,
    random_log_probs,
    random_mask,
    softplus,
    trl_self,
    value_and_grad,
)

from liger_trainer.kernels.losses.reference_free import LOSS_TYPES, CPOLoss, ORPOLoss, log_odds
from liger_trainer.kernels.losses.sequences import tokens_per_group

G, T = 4, 6
CPO = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.5},
    {"loss_type": "sigmoid", "alpha": 0.3, "cpo_alpha": 0.0},
    {"loss_type": "hinge"},
    {"loss_type": "hinge", "alpha": -0.2},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "alpha": 0.25},
    {"loss_type": "simpo"},
    {"loss_type": "simpo", "simpo_gamma": 1.2, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    {"loss_type": "simpo", "alpha": 0.5, "cpo_alpha": 0.0},
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2)


def make_batch():
    """Log-probabilities, masks of the completions, mask of the chosen's prompt and completion."""
    log_probs, mask = random_log_probs(G, 2, T), random_mask(G, 2, T)
    nll_mask = mask[:, 0].flip(-1).cumsum(-1).flip(-1) > 0  # all up to the completion's end
    return log_probs, mask, nll_mask


def picked(log_probs, mask) -> list[float]:
    return [x for x, m in zip(log_probs, mask, strict=True) if m]


def slow_orpo(log_probs, mask, nll_mask, beta):
    tokens, ratios = [], []
    for row, sides, whole in zip(log_probs, mask, nll_mask, strict=True):
        tokens += picked(row[0], whole)
        p = [math.exp(mean(picked(row[side], sides[side]))) for side in (0, 1)]
        odds = [x / (1 - x) for x in p]
        ratios.append(math.log(1 / (1 + odds[1] / odds[0])))
    return -mean(tokens) - beta * mean(ratios)


def slow_cpo(log_probs, mask, o: CPOLoss):
    tokens, losses = [], []
    for row, sides in zip(log_probs, mask, strict=True):
        kept = [picked(row[side], sides[side]) for side in (0, 1)]
        tokens += kept[0]
        x = [mean(k) if o.loss_type in ("ipo", "simpo") else sum(k) for k in kept]
        if o.alpha:
            x = [(1 - math.exp(v) ** -o.alpha) / o.alpha for v in x]
        delta, e = x[0] - x[1], o.label_smoothing
        if o.loss_type == "hinge":
            losses.append(max(0.0, 1 - o.beta * delta))
        elif o.loss_type == "ipo":
            losses.append((delta - 1 / (2 * o.beta)) ** 2)
        else:
            margin = o.beta * delta - (o.simpo_gamma if o.loss_type == "simpo" else 0.0)
            losses.append((1 - e) * softplus(-margin) + e * softplus(margin))
    return mean(losses) - o.cpo_alpha * mean(tokens)


def test_orpo_is_the_papers():
    log_probs, mask, nll_mask = make_batch()
    loss = ORPOLoss(0.7)
    assert_agrees(
        lambda x: loss(x, mask, nll_mask).loss.mean(),
        lambda x: slow_orpo(x, mask.tolist(), nll_mask.tolist(), 0.7),
        log_probs,
    )


@pytest.mark.parametrize("given", CPO, ids=lambda o: "-".join(map(str, o.values())))
def test_cpo_is_the_papers(given):
    log_probs, mask, _ = make_batch()
    loss = CPOLoss(0.6, **given)
    assert_agrees(
        lambda x: loss(x, mask).loss.mean(), lambda x: slow_cpo(x, mask.tolist(), loss), log_probs
    )


def test_simpo_is_the_papers():
    log_probs, mask, _ = make_batch()
    loss = CPOLoss.simpo(2.0, 0.8)

    def slow(x):  # equation 6
        losses = []
        for row, sides in zip(x, mask.tolist(), strict=True):
            reward = [2.0 / sum(m) * sum(picked(r, m)) for r, m in zip(row, sides, strict=True)]
            losses.append(-math.log(1 / (1 + math.exp(-(reward[0] - reward[1] - 0.8)))))
        return mean(losses)

    assert_agrees(lambda x: loss(x, mask).loss.mean(), slow, log_probs)
    assert CPOLoss.simpo(cpo_alpha=0.3, label_smoothing=0.1) == CPOLoss(
        0.1, "simpo", 0.1, 0.5, 0.0, 0.3
    )


def test_small_alpha_is_the_plain_reward():
    log_probs, mask, _ = make_batch()
    small, none = (CPOLoss(0.6, alpha=a)(log_probs, mask).loss for a in (1e-9, 0.0))
    torch.testing.assert_close(small, none, rtol=1e-6, atol=1e-8)


def test_parts_that_are_reported():
    log_probs, mask, nll_mask = make_batch()
    sums, n = log_probs.masked_fill(~mask, 0.0).sum(-1), mask.sum(-1)
    out = ORPOLoss(0.7)(log_probs.requires_grad_(), mask, nll_mask)
    means = (sums / n).detach()
    torch.testing.assert_close(torch.stack(out[1:3], 1), 0.7 * means, **FP64)
    torch.testing.assert_close(torch.stack(out[3:5], 1), means, **FP64)
    torch.testing.assert_close(out.nll.mean(), -log_probs[:, 0][nll_mask].mean().detach(), **FP64)
    odds = means.exp() / (1 - means.exp())
    torch.testing.assert_close(out.log_odds, (odds[:, 0] / odds[:, 1]).log(), **FP64)
    assert not any(x.requires_grad for x in out[1:])

    out = CPOLoss(0.6, alpha=0.3)(log_probs, mask)
    rewards = 0.6 * (1 - sums.exp() ** -0.3) / 0.3
    torch.testing.assert_close(torch.stack(out[1:3], 1), rewards.detach(), **FP64)
    torch.testing.assert_close(torch.stack(out[3:5], 1), sums.detach(), **FP64)
    torch.testing.assert_close(out.nll.mean(), -log_probs[:, 0][mask[:, 0]].mean().detach(), **FP64)
    assert not any(x.requires_grad for x in out[1:6])
    assert not CPOLoss.simpo()(log_probs, mask).nll.any()


@pytest.mark.parametrize("loss", [ORPOLoss(), *(CPOLoss(**o) for o in CPO)], ids=str)
def test_groups_one_at_a_time(loss):
    log_probs, mask, nll_mask = make_batch()
    orpo = isinstance(loss, ORPOLoss)
    count = tokens_per_group(nll_mask if orpo else mask[:, 0], torch.float64)
    assert loss.couples_groups == loss.separable_by_tokens == (orpo or loss.cpo_alpha != 0)
    given = {"tokens_per_group": count} if loss.couples_groups else {}
    arguments = (mask, nll_mask) if orpo else (mask,)

    def apart(x):
        parts = [loss(*(a[g : g + 1] for a in (x, *arguments)), **given).loss for g in range(G)]
        return torch.cat(parts).mean()

    together = value_and_grad(lambda x: loss(x, *arguments).loss.mean(), log_probs)
    for got, expected in zip(value_and_grad(apart, log_probs), together, strict=True):
        torch.testing.assert_close(got, expected, **FP64)


def test_log_odds_over_the_whole_range():
    log_p = torch.tensor([-200.0, -50.0, -1.0, -0.7, -math.log(2), -0.6, -1e-3, -1e-9, -1e-14])
    log_p = log_p.double().requires_grad_()
    value = log_odds(log_p)
    for x, got in zip(log_p.tolist(), value.tolist(), strict=True):
        series = math.log(-x) + x / 2 + x * x / 24  # of log(1 - e^x) at 0
        expected = x - (series if x > -1e-2 else math.log1p(-math.exp(x)))
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    value.sum().backward()
    expected = torch.tensor([1 / -math.expm1(x) for x in log_p.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_p.grad, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_tokens_have_finite_odds(dtype):
    """Probability 1, also a rounding error above it: log(1 - p) has no value there."""
    log_p = torch.tensor([0.0, 1e-6, -0.0], dtype=dtype, requires_grad=True)
    value = log_odds(log_p)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert not log_p.grad.any()
    smallest = torch.tensor([-1.2e-7 / 4096], dtype=dtype, requires_grad=True)  # a mean of T tokens
    log_odds(smallest).backward()
    torch.testing.assert_close(1 / smallest.grad, -smallest.detach())


LOSSES = [ORPOLoss(), *(CPOLoss(loss_type=n) for n in LOSS_TYPES), CPOLoss(alpha=0.5)]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("token", [0.0, -1e-8, -50.0, -500.0])
def test_extremes_are_finite_in_fp32(loss, token):
    _, mask, nll_mask = make_batch()
    mask[0, 0] = mask[1] = False  # an empty completion, an empty pair
    for other in (-1.0, token):
        log_probs = torch.full((G, 2, T), token)
        log_probs[:, 1] = other
        if isinstance(loss, ORPOLoss):
            used = mask.clone()
            used[:, 0] |= nll_mask
            arguments = (mask, nll_mask)
        else:
            used, arguments = mask, (mask,)
        log_probs = log_probs.masked_fill(~used, float("nan"))  # never read
        value, grad = value_and_grad(lambda x, a=arguments: loss(x, *a).loss.mean(), log_probs)
        assert_finite(value, grad, used)
        assert value.dtype == torch.float32


def test_nothing_to_average_is_zero():
    log_probs, mask, nll_mask = make_batch()
    empty = torch.zeros_like(mask)
    value, grad = value_and_grad(
        lambda x: ORPOLoss()(x, empty, torch.zeros_like(nll_mask)).loss.mean(), log_probs
    )
    assert value.item() == pytest.approx(0.1 * math.log(2))
    assert not grad.any()
    value, grad = value_and_grad(lambda x: CPOLoss()(x, empty).loss.mean(), log_probs)
    assert value.item() == pytest.approx(math.log(2))
    assert not grad.any()


def test_trl_orpo_computes_the_same():
    orpo = pytest.importorskip("trl.experimental.orpo")
    log_probs, mask, nll_mask = (x.float() if x.is_floating_point() else x for x in make_batch())
    means = log_probs.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    loss = ORPOLoss(0.7)
    losses, *rewards, _, theirs = orpo.ORPOTrainer.odds_ratio_loss(
        trl_self(loss), means[:, 0], means[:, 1]
    )
    out = loss(log_probs, mask, nll_mask)
    torch.testing.assert_close(out.loss - out.nll, -losses)
    torch.testing.assert_close(out.log_odds.mean(), theirs)
    torch.testing.assert_close(out[1:3], tuple(rewards))


@pytest.mark.parametrize("given", CPO, ids=lambda o: "-".join(map(str, o.values())))
def test_trl_cpo_computes_the_same(given):
    cpo = pytest.importorskip("trl.experimental.cpo")
    log_probs, mask, _ = make_batch()
    loss = CPOLoss(0.6, **given)
    x = log_probs.masked_fill(~mask, 0.0).sum(-1)
    if loss.loss_type in ("ipo", "simpo"):
        x = x / mask.sum(-1)
    losses, *rewards = cpo.CPOTrainer.cpo_loss(trl_self(loss), x[:, 0], x[:, 1])
    out = loss(log_probs, mask)
    torch.testing.assert_close(out.loss - loss.cpo_alpha * out.nll, losses, **FP64)
    torch.testing.assert_close(out[1:3], tuple(rewards), **FP64)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_never_reads_the_device(loss):
    """A tensor on `meta` has no values: whatever asks for one raises."""
    log_probs, mask, nll_mask = (x.to("meta") for x in make_batch())
    arguments = (mask, nll_mask) if isinstance(loss, ORPOLoss) else (mask,)
    value_and_grad(lambda x: loss(x, *arguments).loss.sum(), log_probs)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_compiles_without_a_graph_break(loss):
    torch.compiler.reset()  # else one test's recompilations count against the next
    log_probs, mask, nll_mask = make_batch()
    arguments = (mask, nll_mask) if isinstance(loss, ORPOLoss) else (mask,)
    compiled = torch.compile(lambda *a: loss(*a).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(log_probs, *arguments), loss(log_probs, *arguments).loss)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *((lambda b=b: ORPOLoss(b), ["beta"]) for b in (0.0, -1.0, math.nan)),
        *((lambda b=b: CPOLoss(b), ["beta"]) for b in (0.0, -1.0, math.inf)),
        *((lambda n=n: CPOLoss(loss_type=n, label_smoothing=0.1), ["label_smoothing", n])
          for n in ("hinge", "ipo")),
        *((lambda n=n: CPOLoss(loss_type=n, simpo_gamma=1.0), ["simpo_gamma", n])
          for n in ("sigmoid", "hinge", "ipo")),
        (lambda: CPOLoss(label_smoothing=1.5), ["label_smoothing", "1.5"]),
        (lambda: CPOLoss(cpo_alpha=-1.0), ["cpo_alpha"]),
        (lambda: CPOLoss(alpha=math.nan), ["alpha"]),
        (lambda: CPOLoss(loss_type="kto_pair"), ["kto_pair", "simpo"]),
        (lambda: CPOLoss.simpo(gamma=math.inf), ["simpo_gamma"]),
    ],
)  # fmt: skip
def test_bad_options_raise(make, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the words are checked below
        make()
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input_raises():
    log_probs, mask, nll_mask = make_batch()
    with pytest.raises(ValueError, match=r"\[G, 2, T\]"):
        CPOLoss()(log_probs[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="nll_mask must have shape"):
        ORPOLoss()(log_probs, mask, nll_mask[:, 1:])
    with pytest.raises(ValueError, match=r"nll_mask\.bool"):
        ORPOLoss()(log_probs, mask, nll_mask.long())
