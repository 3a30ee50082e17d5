"""DPO's family against implementations in plain Python, from the papers."""

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
    trl_self,
    value_and_grad,
)
from slow_preference import Slow

from liger_trainer.kernels.losses.dpo import F_DIVERGENCES, LOSS_TYPES, DPOLoss
from liger_trainer.kernels.losses.sequences import sequence_log_probs, tokens_per_group

G, T = 4, 6
SCORED = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
PAIRED = [name for name in LOSS_TYPES if name not in ("aot", "aot_unpaired", "sft")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def make_batch():
    log_probs, mask = random_log_probs(G, 2, T), random_mask(G, 2, T)
    ref = (log_probs + torch.randn(G, 2, T)).masked_fill(~mask, 0.0).sum(-1)
    return log_probs, mask, ref


def options(name: str) -> dict:
    """Options that make a loss not the default one."""
    smoothed = {"robust": 0.2, "exo_pair": 0.1, "aot": 0.2, "aot_unpaired": 0.3}
    extra = {"label_smoothing": smoothed[name]} if name in smoothed else {}
    return {"beta": 0.7, "loss_type": name, **extra}


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_is_the_papers(name):
    log_probs, mask, ref = make_batch()
    given = options(name)
    slow = Slow(mask, ref, 0.7, given.get("label_smoothing", 0.0))
    loss = DPOLoss(**given)
    assert_agrees(lambda x: loss(x, mask, ref).loss.mean(), lambda x: slow(name, x), log_probs)


@pytest.mark.parametrize("divergence", [d for d in F_DIVERGENCES if d != "reverse_kl"])
@pytest.mark.parametrize("name", SCORED)
def test_f_divergence(name, divergence):
    log_probs, mask, ref = make_batch()
    alpha = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    given = {**options(name), "f_divergence_type": divergence, **alpha}
    slow = Slow(mask, ref, 0.7, given.get("label_smoothing", 0.0), 0.05, divergence, 0.3)
    loss = DPOLoss(**given)
    assert_agrees(lambda x: loss(x, mask, ref).loss.mean(), lambda x: slow(name, x), log_probs)


def test_alpha_divergence_is_continuous_where_it_becomes_the_log_ratio():
    log_probs, mask, ref = make_batch()
    alpha = {"f_divergence_type": "alpha_divergence"}
    at, near, plain = (
        DPOLoss(**o)(log_probs, mask, ref).loss
        for o in (
            {**alpha, "f_alpha_divergence_coef": 1.0},
            {**alpha, "f_alpha_divergence_coef": 1.0 + 1e-5},
            {},
        )
    )
    torch.testing.assert_close(at, plain, rtol=0, atol=0)
    torch.testing.assert_close(near, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n != "sft"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_alpha(name, ld_alpha):
    log_probs, mask, ref = make_batch()
    given = options(name)
    slow = Slow(mask, ref, 0.7, given.get("label_smoothing", 0.0), ld_alpha=ld_alpha)
    loss = DPOLoss(**given, ld_alpha=ld_alpha)
    assert_agrees(lambda x: loss(x, mask, ref).loss.mean(), lambda x: slow(name, x), log_probs)


def test_ld_alpha_one_is_the_sum():
    log_probs, mask, _ = make_batch()
    whole = sequence_log_probs(log_probs, mask)
    torch.testing.assert_close(sequence_log_probs(log_probs, mask, 1.0), whole)
    assert not torch.allclose(sequence_log_probs(log_probs, mask, 0.5), whole)
    with pytest.raises(ValueError, match="pair"):
        sequence_log_probs(log_probs[:, 0], mask[:, 0], 0.5)


def test_discopop_tau():
    log_probs, mask, ref = make_batch()
    loss, slow = DPOLoss(0.7, "discopop", discopop_tau=0.9), Slow(mask, ref, 0.7, tau=0.9)
    assert_agrees(
        lambda x: loss(x, mask, ref).loss.mean(), lambda x: slow("discopop", x), log_probs
    )


@pytest.mark.parametrize("name", PAIRED)
def test_weighting_is_a_constant_factor_of_each_pair(name):
    log_probs, mask, ref = make_batch()
    log_sum_sq = -torch.rand(G, 2, T, dtype=torch.float64)
    weights = []
    for g in range(G):  # WPO, equation 2: the mean over the tokens of log p - log sum p^2
        exponent = 0.0
        for side in (0, 1):
            at = [t for t in range(T) if mask[g, side, t]]
            exponent += mean([float(log_probs[g, side, t] - log_sum_sq[g, side, t]) for t in at])
        weights.append(math.exp(exponent))
    given = options(name)
    slow = Slow(mask, ref, 0.7, given.get("label_smoothing", 0.0))
    loss = DPOLoss(**given, use_weighting=True)
    assert_agrees(
        lambda x: loss(x, mask, ref, log_sum_sq_probs=log_sum_sq).loss.mean(),
        lambda x: slow(name, x, weights),
        log_probs,
    )


def test_combination_is_the_weighted_sum():
    log_probs, mask, ref = make_batch()
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5)
    slow, loss = Slow(mask, ref, 0.7), DPOLoss(0.7, names, weights)
    assert_agrees(
        lambda x: loss(x, mask, ref).loss.mean(),
        lambda x: sum(w * slow(n, x) for n, w in zip(names, weights, strict=True)),
        log_probs,
    )
    plain = DPOLoss(0.7, list(names))(log_probs, mask, ref).loss.mean()
    expected = sum(slow(n, log_probs.tolist()) for n in names)
    torch.testing.assert_close(plain.item(), expected, **FP64)


def test_rewards_and_log_probs_are_detached_numbers_of_each_completion():
    log_probs, mask, ref = make_batch()
    out = DPOLoss(0.7)(log_probs.requires_grad_(), mask, ref)
    sums = log_probs.detach().masked_fill(~mask, 0.0).sum(-1)
    torch.testing.assert_close(out.chosen_rewards, 0.7 * (sums - ref)[:, 0], **FP64)
    torch.testing.assert_close(out.rejected_rewards, 0.7 * (sums - ref)[:, 1], **FP64)
    torch.testing.assert_close(out.chosen_log_probs, sums[:, 0], **FP64)
    torch.testing.assert_close(out.rejected_log_probs, sums[:, 1], **FP64)
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("names", [*((n,) for n in LOSS_TYPES), ("sigmoid", "sft")], ids="-".join)
def test_groups_one_at_a_time(names):
    log_probs, mask, ref = make_batch()
    loss = DPOLoss(**{**options(names[0]), "loss_type": names})
    assert loss.couples_groups == bool({"aot", "aot_unpaired", "sft"} & set(names))
    assert loss.separable_by_tokens == ("sft" in names)
    if {"aot", "aot_unpaired"} & set(names):
        return
    count = tokens_per_group(mask[:, 0], torch.float64) if "sft" in names else None

    def apart(x):
        parts = [
            loss(x[g : g + 1], mask[g : g + 1], ref[g : g + 1], tokens_per_group=count).loss
            for g in range(G)
        ]
        return torch.cat(parts).mean()

    together, grad = value_and_grad(lambda x: loss(x, mask, ref).loss.mean(), log_probs)
    value, grad_apart = value_and_grad(apart, log_probs)
    torch.testing.assert_close(value, together, **FP64)
    torch.testing.assert_close(grad_apart, grad, **FP64)


def trl_loss(loss: DPOLoss, log_probs, mask, ref, log_sum_sq) -> torch.Tensor:
    """What TRL's DPOTrainer makes of the same log-probabilities, and the rewards that it logs."""
    trl = pytest.importorskip("trl")
    first = torch.zeros(2 * G, 1, dtype=torch.bool)
    halves = [x.transpose(0, 1).reshape(2 * G, T) for x in (log_probs, mask, log_sum_sq)]
    completion_mask = torch.cat([first, halves[1]], 1)
    self = trl_self(
        loss,
        loss_types=loss.loss_type,
        loss_weights=loss.loss_weights or [1.0] * len(loss.loss_type),
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=loss.discopop_tau),
    )
    outputs = SimpleNamespace(
        log_probs=halves[0].masked_fill(~halves[1], 0.0),
        log_sum_sq_probs=halves[2],
        entropy=halves[2],
        mean_logits=halves[2],
        is_top1=halves[1],
    )
    inputs = {
        "input_ids": completion_mask.long(),
        "attention_mask": completion_mask.long(),
        "completion_mask": completion_mask.long(),
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    value = trl.DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
    metrics = self._metrics["train"]
    return value, metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]


@pytest.mark.parametrize(
    "given",
    [
        *(options(name) for name in LOSS_TYPES),
        *({**options(n), "f_divergence_type": d} for n in SCORED for d in F_DIVERGENCES[1:]),
        *({**options(n), "ld_alpha": 0.3} for n in ("sigmoid", "ipo", "aot", "apo_down")),
        *({**options(n), "use_weighting": True} for n in PAIRED if n != "hinge"),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "discopop", "discopop_tau": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_trl_computes_the_same(given):
    log_probs, mask, ref = (x.float() if x.is_floating_point() else x for x in make_batch())
    log_sum_sq = -torch.rand(G, 2, T)
    loss = DPOLoss(**given)
    out = loss(log_probs, mask, ref, log_sum_sq_probs=log_sum_sq)
    theirs = [0.0, 0.0]

    def their_loss(x):
        value, *theirs[:] = trl_loss(loss, x, mask, ref, log_sum_sq)
        return value

    value, grad = value_and_grad(
        lambda x: loss(x, mask, ref, log_sum_sq_probs=log_sum_sq).loss.mean(), log_probs
    )
    their_value, their_grad = value_and_grad(their_loss, log_probs)
    torch.testing.assert_close(value, their_value, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, their_grad, rtol=2e-5, atol=1e-6)
    ours = [out.chosen_rewards.mean().item(), out.rejected_rewards.mean().item()]
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("ratio", [50.0, -50.0])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_extremes_are_finite_in_fp32(name, divergence, ratio):
    if divergence != "reverse_kl" and name not in SCORED:
        return
    if (name, divergence) == ("ipo", "forward_kl"):
        return  # the square of e^50 is beyond fp32
    log_probs, mask, _ = make_batch()
    mask[0, 0] = mask[1] = False  # an empty completion, an empty pair
    log_probs = log_probs.float().masked_fill(~mask, float("nan"))  # never read
    sums = sequence_log_probs(log_probs, mask)
    loss = DPOLoss(**options(name), f_divergence_type=divergence)
    for ref in (sums - ratio, torch.stack([sums[:, 0] - ratio, sums[:, 1] + ratio], 1)):
        value, grad = value_and_grad(lambda x, r=ref: loss(x, mask, r).loss.mean(), log_probs)
        assert_finite(value, grad, mask)
    assert value.dtype == torch.float32


def test_far_beyond_the_exponential_is_finite():
    log_probs, mask = random_log_probs(G, 2, T).float(), random_mask(G, 2, T)
    sums = sequence_log_probs(log_probs, mask)
    for ref in (sums + 500, sums - 500):
        ref[:, 1] = sums[:, 1]
        for given in (
            {"loss_type": "discopop", "beta": 1.0},
            {"loss_type": "discopop", "beta": 1.0, "discopop_tau": 2.0},
            {"f_divergence_type": "forward_kl"},
            {"f_divergence_type": "alpha_divergence"},
        ):
            loss = DPOLoss(**given)
            value, grad = value_and_grad(
                lambda x, f=loss, r=ref: f(x, mask, r).loss.mean(), log_probs
            )
            assert_finite(value, grad, mask)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_never_reads_the_device(name):
    """A tensor on `meta` has no values: whatever asks for one raises."""
    log_probs, mask, ref = (x.to("meta") for x in make_batch())
    weighting = {"use_weighting": True} if name in PAIRED else {}
    loss = DPOLoss(**options(name), **weighting)
    value_and_grad(lambda x: loss(x, mask, ref, log_sum_sq_probs=log_probs).loss.sum(), log_probs)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()  # else one test's recompilations count against the next
    log_probs, mask, ref = make_batch()
    loss = DPOLoss(**options(name))
    compiled = torch.compile(lambda *a: loss(*a).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(log_probs, mask, ref), loss(log_probs, mask, ref).loss)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({"loss_type": n, "label_smoothing": 0.1}, ["label_smoothing", n])
          for n in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
                    "apo_down", "discopop", "sft", "sigmoid_norm")),
        *(({"loss_type": n, "f_divergence_type": "forward_kl"}, ["f_divergence_type", n])
          for n in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
                    "apo_down", "sft")),
        *(({"loss_type": n, "use_weighting": True}, ["use_weighting", n])
          for n in ("aot", "aot_unpaired", "sft")),
        *(({"loss_type": n, "discopop_tau": 0.1}, ["discopop_tau", n])
          for n in LOSS_TYPES if n != "discopop"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, ["ld_alpha", "sft"]),
        ({"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"}, ["bco_pair"]),
        ({"f_alpha_divergence_coef": 0.3}, ["f_alpha_divergence_coef", "reverse_kl"]),
        ({"loss_type": "sigmod"}, ["sigmod", "sigmoid_norm"]),
        ({"loss_type": ()}, ["loss_type", "sigmoid_norm"]),
        ({"f_divergence_type": "kl"}, ["'kl'", "forward_kl"]),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, ["loss_weights", "1 numbers"]),
        ({"loss_weights": [math.nan]}, ["loss_weights"]),
        *(({"beta": b}, ["beta", str(b)]) for b in (0.0, -0.1, math.inf, math.nan)),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ["label_smoothing", "0.5"]),
        ({"loss_type": "robust", "label_smoothing": -0.1}, ["label_smoothing"]),
        ({"loss_type": "exo_pair"}, ["label_smoothing", "exo_pair"]),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, ["label_smoothing"]),
        ({"loss_type": "aot", "label_smoothing": 1.1}, ["label_smoothing"]),
        ({"ld_alpha": 1.1}, ["ld_alpha"]),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, ["discopop_tau"]),
    ],
)  # fmt: skip
def test_bad_options_raise(given, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the words are checked below
        DPOLoss(**given)
    assert all(word in str(error.value) for word in words), error.value


def test_options_that_one_of_several_losses_uses_are_taken():
    DPOLoss(0.1, ("sigmoid", "robust"), label_smoothing=0.1)
    DPOLoss(0.1, ("sigmoid", "sft"), f_divergence_type="forward_kl", ld_alpha=0.5)


def test_bad_input_raises():
    log_probs, mask, ref = make_batch()
    loss = DPOLoss()
    for match, args in {
        r"\[G, 2, T\]": (log_probs[:, 0], mask[:, 0], ref),
        "mask.bool": (log_probs, mask.long(), ref),
        "mask must have shape": (log_probs, mask[..., 1:], ref),
        r"log_probs.float\(\)": (log_probs.half(), mask, ref),
        "ref_log_probs must": (log_probs, mask, ref[:, 0]),
    }.items():
        with pytest.raises(ValueError, match=match):
            loss(*args)
    with pytest.raises(ValueError, match="log_sum_sq_probs is needed"):
        DPOLoss(use_weighting=True)(log_probs, mask, ref)
