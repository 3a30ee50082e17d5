"""GRPO's family, RLOO and the advantages against implementations in plain Python."""

import math
import statistics

import pytest
import torch
from policy_cases import CASES, EVERY, EXTRAS, RLOO, B, T, make_batch, name_of, needed
from sequence_losses import FP64, assert_agrees, assert_finite, value_and_grad
from slow_policy import slow_grpo, slow_rloo

from liger_trainer.kernels.losses.advantages import group_advantages, leave_one_out_advantages
from liger_trainer.kernels.losses.grpo import LOSS_TYPES, GRPOLoss, RLOOLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(4)


def as_lists(mask, advantages, given: dict) -> dict:
    return {k: v.tolist() for k, v in {"mask": mask, "advantages": advantages, **given}.items()}


@pytest.mark.parametrize("given", CASES, ids=name_of)
def test_loss_is_the_papers(given):
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(**given)
    given = needed(loss, others)
    lists, base = as_lists(mask, advantages, given), log_probs.tolist()
    assert_agrees(
        lambda x: loss(x, mask, advantages, **given).loss.sum(),
        lambda x: slow_grpo(x, base, loss, lists),
        log_probs,
    )


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda e: "-".join(e) or "none")
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_optional_inputs(name, extras):
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(
        name, 0.3, entropy_coef=0.1, off_policy_mask_threshold=0.01,
        max_completion_length=9 if name == "dr_grpo" else None,
    )  # fmt: skip
    given = needed(loss, others, extras)
    lists, base = as_lists(mask, advantages, given), log_probs.tolist()
    assert_agrees(
        lambda x: loss(x, mask, advantages, **given).loss.sum(),
        lambda x: slow_grpo(x, base, loss, lists),
        log_probs,
    )


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_advantages_of_tokens_and_ratios_of_completions(name):
    log_probs, mask, _, others = make_batch()
    loss = GRPOLoss(name, max_completion_length=9 if name == "dr_grpo" else None)
    advantages = torch.randn(B, T, dtype=torch.float64)
    given = needed(loss, others)
    if name != "vespo":
        given["importance_sampling_ratio"] = torch.rand(B, 1, dtype=torch.float64)
    lists, base = as_lists(mask, advantages, given), log_probs.tolist()
    assert_agrees(
        lambda x: loss(x, mask, advantages, **given).loss.sum(),
        lambda x: slow_grpo(x, base, loss, lists),
        log_probs,
    )


def test_entropy_has_a_gradient():
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss("grpo", entropy_coef=0.2)
    top = others["top_entropy_mask"]
    _, grad = value_and_grad(
        lambda e: loss(log_probs, mask, advantages, entropy=e, top_entropy_mask=top).loss.sum(),
        others["entropy"],
    )
    expected = torch.where(mask & top, -0.2 / (mask & top).sum().double(), 0.0)
    torch.testing.assert_close(grad, expected, **FP64)


def test_what_is_reported():
    log_probs, mask, advantages, others = make_batch()
    advantages = advantages[:, None].expand(B, T).contiguous()
    ref, entropy = others["ref_log_probs"], others["entropy"]
    old = log_probs + torch.randn(B, T, dtype=torch.float64)
    u = (log_probs - old).exp().where(mask, 1.0)
    q = (ref - log_probs).where(mask, 0.0)
    given = {"old_log_probs": old, "ref_log_probs": ref, "entropy": entropy}
    loss = GRPOLoss("dapo", 0.3, 0.1, 0.3, entropy_coef=0.2)
    out = loss(log_probs.requires_grad_(), mask, advantages, **given)
    assert (out.clipped_low & mask).any()
    assert (out.clipped_high & mask).any()
    assert torch.equal(out.clipped_low, (u < 0.9) & (advantages < 0))
    assert torch.equal(out.clipped_high, (u > 1.3) & (advantages > 0))
    torch.testing.assert_close(out.kl, u * (q.exp() - q - 1), **FP64)
    bonus = 0.2 * (entropy * mask).sum() / mask.sum()
    torch.testing.assert_close(out.loss.sum(), out.policy_loss.sum() - bonus, **FP64)
    assert not any(x is not None and x.requires_grad for x in out[1:])

    out = GRPOLoss("cispo", epsilon_high=1.2)(log_probs, mask, advantages, old_log_probs=old)
    assert out.clipped_low is None
    assert torch.equal(out.clipped_high, (u > 1.2) & (advantages > 0))
    out = GRPOLoss("dapo", importance_sampling_level="sequence")(log_probs, mask, advantages[:, 0])
    assert out.clipped_high.shape == (B, 1)
    out = GRPOLoss("vespo")(log_probs, mask, advantages[:, 0])
    torch.testing.assert_close(out.sequence_weight, torch.ones(B, 1, dtype=torch.float64))
    assert not out.sequence_weight.requires_grad


def test_vespo_bounds_each_token_and_the_whole():
    d = torch.tensor([[30.0, -25.0], [-30.0, 0.0], [0.0, 0.0], [30.0, 30.0]]).double()
    mask = torch.ones_like(d, dtype=torch.bool)
    loss = GRPOLoss("vespo", vespo_k_pos=0.1)
    given = {"old_log_probs": torch.zeros_like(d)}
    out = loss(d, mask, torch.ones(4), **given)
    lowest = 1e-8**0.1 * math.exp(3 * (1 - 1e-8))
    assert out.sequence_weight.flatten().tolist() == pytest.approx([1.0, lowest, 1.0, 0.0])
    ratio = torch.zeros_like(d)  # masked by the sampler
    ratio[0, 1] = 1e8 * math.e
    given["importance_sampling_ratio"] = ratio
    out = loss(torch.zeros_like(d), mask, torch.ones(4), **given)
    first = math.exp(0.1 + 3 * (1 - math.e))
    assert out.sequence_weight.flatten().tolist() == pytest.approx([first] + [lowest] * 3)


def test_tokens_unknown_to_the_sampler_do_not_drift():
    log_probs, mask, _, _ = make_batch()
    loss = GRPOLoss("grpo", off_policy_mask_threshold=0.5)
    sampling = log_probs.clone()
    sampling[0] = math.nan
    sampling[1] += 0.4
    sampling[2] += 0.6
    out = loss(log_probs, mask, torch.full((B,), -1.0), sampling_log_probs=sampling)
    assert (out.loss != 0).tolist() == [True, True, False, False, True]  # 3 has no tokens


@pytest.mark.parametrize("given", CASES, ids=name_of)
def test_nan_outside_the_mask_has_no_influence(given):
    log_probs, mask, _, others = make_batch()
    loss = GRPOLoss(**given)
    others = needed(loss, others, ("old_log_probs", "importance_sampling_ratio"))
    others["advantages"] = torch.randn(B, T, dtype=torch.float64)
    poisoned = {name: t.where(mask, math.nan) for name, t in others.items()}
    results = [
        value_and_grad(lambda x, given=given: loss(x, mask, **given).loss.sum(), log_probs)
        for given in (others, poisoned)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("given", CASES, ids=name_of)
def test_completions_one_at_a_time(given):
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(**given)
    others = needed(loss, others, ("old_log_probs", "top_entropy_mask"))
    top = others["top_entropy_mask"]
    normalizers = loss.normalizers(mask, top, dtype=torch.float64)

    def apart(x):
        return sum(
            loss(*(a[b : b + 1] for a in (x, mask, advantages)), normalizers=normalizers,
                 **{k: v[b : b + 1] for k, v in others.items()}).loss.sum()
            for b in range(B)
        )  # fmt: skip

    together = value_and_grad(lambda x: loss(x, mask, advantages, **others).loss.sum(), log_probs)
    for got, expected in zip(value_and_grad(apart, log_probs), together, strict=True):
        torch.testing.assert_close(got, expected, **FP64)


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7)], ids=["int", "float", "tensor"])
def test_normalizers(items):
    _, mask, _, others = make_batch()
    tokens, top = mask.sum().item(), (mask & others["top_entropy_mask"]).sum().item()
    assert tokens != top
    expected = {"grpo": 2 * B, "sapo": 2 * B, "luspo": 2 * B, "bnpo": 2 * tokens,
                "dr_grpo": 2 * B * 9, "dapo": 7, "cispo": 7, "vespo": 7}  # fmt: skip
    for given in EVERY:
        loss, options = GRPOLoss(**given), {"accumulation_steps": 2, "num_items_in_batch": items}
        found = loss.normalizers(mask, others["top_entropy_mask"], **options)
        assert float(found.policy) == expected[loss.loss_type]
        assert float(found.entropy) == 2 * top
        assert float(loss.normalizers(mask, **options).entropy) == 2 * tokens
    assert float(GRPOLoss("dapo").normalizers(mask, accumulation_steps=2).policy) == 2 * tokens
    for nothing in (0, torch.tensor(0)):
        found = GRPOLoss("dapo").normalizers(mask & False, num_items_in_batch=nothing)
        assert [float(x) for x in found] == [1, 1]


@pytest.mark.parametrize("given", [o for o in CASES if "entropy_coef" not in o], ids=name_of)
@pytest.mark.parametrize("ratio", [50.0, -50.0, 200.0, -200.0])
def test_extremes_are_finite_in_fp32(given, ratio):
    log_probs, mask, advantages, _ = make_batch()
    loss, filled = GRPOLoss(**given), log_probs.float().masked_fill(~mask, float("nan"))
    for sign in (1, -1):  # the ratios to both policies alike, and against each other
        others = {"old_log_probs": filled - ratio}
        if loss.beta:
            others["ref_log_probs"] = filled + sign * ratio
        value, grad = value_and_grad(
            lambda x, o=others: loss(x, mask, advantages.float(), **o).loss.sum(), filled
        )
        assert_finite(value, grad, mask)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("given", EVERY, ids=name_of)
def test_nothing_to_train_on_is_zero(given):
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(**given, beta=0.3, entropy_coef=0.2)
    others = needed(loss, others)
    value, grad = value_and_grad(
        lambda x: loss(x, torch.zeros_like(mask), advantages, **others).loss.sum(), log_probs
    )
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("given", CASES, ids=name_of)
def test_never_reads_the_device(given):
    """A tensor on `meta` has no values: whatever asks for one raises."""
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(**given)
    others = needed(loss, others, ("old_log_probs", "top_entropy_mask", "sampling_log_probs"))
    others = {k: v.to("meta") for k, v in others.items()}
    value_and_grad(
        lambda x: loss(x, mask.to("meta"), advantages.to("meta"), **others).loss.sum(),
        log_probs.to("meta"),
    )


@pytest.mark.parametrize("given", EVERY, ids=name_of)
def test_compiles_without_a_graph_break(given):
    torch.compiler.reset()  # else one test's recompilations count against the next
    log_probs, mask, advantages, others = make_batch()
    loss = GRPOLoss(**given, beta=0.3)
    call = lambda x, ref: loss(x, mask, advantages, ref_log_probs=ref).loss  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    ref = others["ref_log_probs"]
    torch.testing.assert_close(compiled(log_probs, ref), call(log_probs, ref))


@pytest.mark.parametrize("given", RLOO, ids=name_of)
def test_rloo(given):
    log_probs, mask, advantages, _ = make_batch()
    loss = RLOOLoss(**given)
    sums = log_probs.masked_fill(~mask, 0.0).sum(-1)
    old = sums - torch.tensor([0.7, -0.8, 0.1, 0.0, 0.8], dtype=torch.float64)
    bounds = given.get("epsilon_low", 0.2), given.get("epsilon_high", 0.2)
    assert_agrees(
        lambda x: loss(x, mask, advantages, old_log_probs=old).loss.sum(),
        lambda x: slow_rloo(x, mask.tolist(), advantages.tolist(), old.tolist(), *bounds),
        log_probs,
    )
    out = loss(log_probs, mask, advantages, old_log_probs=old)
    u = (sums - old).exp()
    assert torch.equal(out.clipped_low[:, 0], (u < 1 - bounds[0]) & (advantages < 0))
    assert torch.equal(out.clipped_high[:, 0], (u > 1 + bounds[1]) & (advantages > 0))
    on_policy, grad = value_and_grad(lambda x: loss(x, mask, advantages).loss.sum(), log_probs)
    torch.testing.assert_close(on_policy, -advantages.mean(), **FP64)
    torch.testing.assert_close(grad, -advantages[:, None] / B * mask, **FP64)
    parts = [
        loss(*(a[b : b + 1] for a in (log_probs, mask, advantages)),
             old_log_probs=old[b : b + 1], num_sequences=B).loss
        for b in range(B)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), out.loss, **FP64)
    for ratio in (50.0, -50.0, 500.0):
        value, grad = value_and_grad(
            lambda x, r=ratio: loss(x, mask, advantages, old_log_probs=sums - r).loss.sum(),
            log_probs.float(),
        )
        assert_finite(value, grad, mask)


def test_advantages():
    rewards = [1.0, 2.0, 4.0, 3.0, 3.0, 3.0, 0.5, math.nan, 2.5, math.nan, math.nan, 1.0]
    tensor = torch.tensor(rewards, dtype=torch.float64)
    kept = [r for r in rewards if not math.isnan(r)]
    group, batch, none, out = [], [], [], []
    for i, r in enumerate(rewards):
        peers = [x for x in rewards[i // 3 * 3 : i // 3 * 3 + 3] if not math.isnan(x)]
        alone = math.isnan(r) or len(peers) == 1
        centered = 0.0 if alone else r - statistics.mean(peers)
        none.append(centered)
        batch.append(centered / (statistics.stdev(kept) + 1e-4))
        group.append(0.0 if alone else centered / (statistics.stdev(peers) + 1e-4))
        others = (sum(peers) - r) / (len(peers) - 1) if not alone else math.nan
        out.append(r - others)
    for scale, expected in {"group": group, "batch": batch, "none": none}.items():
        assert group_advantages(tensor, 3, scale).tolist() == pytest.approx(expected)
    assert leave_one_out_advantages(tensor, 3).tolist() == pytest.approx(
        [0.0 if math.isnan(x) else x for x in out]
    )
    counted = [x for x in out if not math.isnan(x)]
    mu, sd = statistics.mean(counted), statistics.stdev(counted)
    normalized = [0.0 if math.isnan(x) else (x - mu) / (sd + 1e-4) for x in out]
    found = leave_one_out_advantages(tensor, 3, normalize=True).tolist()
    assert found == pytest.approx(normalized)
    assert not group_advantages(tensor, 1).any()
    with pytest.raises(ValueError, match="num_generations is 5"):
        group_advantages(tensor, 5)
    with pytest.raises(ValueError, match="batch"):
        group_advantages(tensor, 3, "std")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({"loss_type": n, "delta": 4.0}, ["delta", n]) for n in ("cispo", "sapo", "vespo")),
        *(({"loss_type": n, k: 0.1}, [k, n])
          for n in ("sapo", "vespo") for k in ("epsilon_low", "epsilon_high")),
        *(({"loss_type": n, f"sapo_temperature_{s}": 3.0}, ["sapo_temperature", n])
          for n in LOSS_TYPES if n != "sapo" for s in ("pos", "neg")),
        *(({"loss_type": n, f"vespo_{k}_{s}": 4.0}, [f"vespo_{k}", n])
          for n in LOSS_TYPES if n != "vespo" for k in ("k", "lambda") for s in ("pos", "neg")),
        *(({"loss_type": n, "max_completion_length": 9}, ["max_completion_length", n])
          for n in LOSS_TYPES if n != "dr_grpo"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, ["importance_", "vespo"]),
        ({"loss_type": "cispo", "epsilon_low": 0.1, "epsilon_high": 5.0}, ["epsilon_low", "cispo"]),
        ({"use_bias_correction_kl": False}, ["use_bias_correction_kl", "beta"]),
        ({"loss_type": "dr_grpo"}, ["max_completion_length"]),
        ({"loss_type": "ppo"}, ["ppo", "dapo"]),
        ({"importance_sampling_level": "tokens"}, ["'tokens'", "sequence"]),
        *(({k: -0.1}, [k]) for k in ("beta", "epsilon_low", "epsilon_high", "delta")),
        *(({k: math.nan}, [k]) for k in ("beta", "entropy_coef", "off_policy_mask_threshold")),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, ["sapo_temperature_pos"]),
        ({"loss_type": "vespo", "vespo_lambda_neg": 0.0}, ["vespo_lambda_neg"]),
        ({"loss_type": "vespo", "vespo_k_neg": -1.0}, ["vespo_k_neg"]),
    ],
)  # fmt: skip
def test_bad_options_raise(given, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the words are checked below
        GRPOLoss(**given)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_input_raises():
    log_probs, mask, advantages, others = make_batch()
    for match, loss, given in [
        ("ref_log_probs is needed", GRPOLoss(beta=0.1), {}),
        ("ref_log_probs have no effect", GRPOLoss(), {"ref_log_probs": others["ref_log_probs"]}),
        ("entropy is needed", GRPOLoss(entropy_coef=0.1), {}),
        ("old_log_probs must", GRPOLoss(), {"old_log_probs": others["old_log_probs"][:, 0]}),
        ("top_entropy_mask is torch.int64", GRPOLoss(), {"top_entropy_mask": mask.long()}),
        ("importance_sampling_ratio must", GRPOLoss("vespo"),
         {"importance_sampling_ratio": torch.ones(B, 1)}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            loss(log_probs, mask, advantages, **given)
    for bad in (advantages[1:], advantages[None, :, None], advantages.sum()):
        with pytest.raises(ValueError, match="advantages must"):
            GRPOLoss()(log_probs, mask, bad)
    with pytest.raises(ValueError, match="epsilon_high"):
        RLOOLoss(epsilon_high=-1.0)
