"""GRPO's family and RLOO against the methods of TRL's trainers, without a model."""

from types import SimpleNamespace

import pytest
import torch
from policy_cases import CASES, EVERY, EXTRAS, RLOO, B, make_batch, name_of, needed
from sequence_losses import FP64, trl_self, value_and_grad

from liger_trainer.kernels.losses.grpo import GRPOLoss, RLOOLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def trl_grpo(loss: GRPOLoss, x, mask, advantages, others: dict, steps=1, items=None):
    """What TRL's GRPOTrainer makes of the same numbers, and what it logs."""
    trl = pytest.importorskip("trl")
    top = others.get("top_entropy_mask")
    corrected = "importance_sampling_ratio" in others
    self = trl_self(
        loss,
        args=SimpleNamespace(**vars(loss), steps_per_generation=steps),
        epsilon_high=loss.high,
        top_entropy_quantile=1.0 if top is None else 0.5,
        get_high_entropy_mask=lambda *_: top,
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        current_gradient_accumulation_steps=steps,
        _entropy_bonus_enabled=loss.entropy_coef != 0,
        use_adaptive_entropy=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (x, others["entropy"], None),
    )
    self.accelerator.sync_gradients = True
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum() if items is None else items,
        "ref_per_token_logps": others.get("ref_log_probs"),
        "old_per_token_logps": others.get("old_log_probs"),
    }
    for name in ("sampling_log_probs", "importance_sampling_ratio"):
        if name in others:
            inputs[name.replace("log_probs", "per_token_logps")] = others[name]
    return trl.GRPOTrainer._compute_loss(self, None, inputs), self._metrics["train"]


@pytest.mark.parametrize(
    ("given", "extras"),
    [(given, ("old_log_probs",)) for given in CASES]
    + [({**o, "beta": 0.3, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.01}, extras)
       for o in EVERY for extras in EXTRAS],
    ids=str,
)  # fmt: skip
def test_trl_computes_the_same(given, extras):
    log_probs, mask, advantages, others = make_batch()
    mask[3, 1] = True  # TRL's means over a completion are NaN without tokens
    loss = GRPOLoss(**given)
    others, metrics = needed(loss, others, extras), {}
    masked = {k: v.where(mask, 1.0) if "ratio" in k else v for k, v in others.items()}
    normalizers = loss.normalizers(
        mask, others.get("top_entropy_mask"),
        accumulation_steps=3, num_items_in_batch=torch.tensor(11), dtype=torch.float64,
    )  # fmt: skip

    def theirs(x):
        value, logged = trl_grpo(loss, x, mask, advantages, masked, 3, torch.tensor(11))
        metrics.update(logged)
        return value

    expected = value_and_grad(theirs, log_probs)
    out = loss(log_probs, mask, advantages, normalizers=normalizers, **others)
    ours = value_and_grad(
        lambda x: loss(x, mask, advantages, normalizers=normalizers, **others).loss.sum(),
        log_probs,
    )
    for got, wanted in zip(ours, expected, strict=True):  # TRL rounds SAPO's temperatures to fp32
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)

    def over_tokens(value):
        return (
            value.double().mean() if value.shape[1] == 1 else value[mask].double().mean()
        ).item()

    for key, value in {
        "kl": out.kl, "vespo/phi_seq_mean": out.sequence_weight,
        "clip_ratio/low_mean": out.clipped_low,
        "clip_ratio/high_mean": None if loss.loss_type == "cispo" else out.clipped_high,
        "cispo_clip_ratio": out.clipped_high if loss.loss_type == "cispo" else None,
    }.items():  # fmt: skip
        assert (key in metrics) == (value is not None), key
        if value is not None:
            assert metrics[key][0] == pytest.approx(over_tokens(value), abs=1e-6), key


@pytest.mark.parametrize("given", RLOO, ids=name_of)
def test_trl_rloo_computes_the_same(given):
    trl = pytest.importorskip("trl")
    log_probs, mask, advantages, others = make_batch()
    loss = RLOOLoss(**given)
    old = log_probs.masked_fill(~mask, 0.0).sum(-1) + 0.3 * torch.randn(B, dtype=torch.float64)
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_logps": old,
    }

    def theirs(x):
        self = trl_self(
            loss,
            epsilon_high=loss.epsilon_low if loss.epsilon_high is None else loss.epsilon_high,
            _get_per_token_logps_and_entropies=lambda *_, **__: (x, others["entropy"], None),
        )
        return trl.RLOOTrainer._compute_loss(self, None, inputs)

    expected = value_and_grad(theirs, log_probs)
    ours = value_and_grad(
        lambda x: loss(x, mask, advantages, old_log_probs=old).loss.sum(), log_probs
    )
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, **FP64)
