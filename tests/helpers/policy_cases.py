"""What the tests of `kernels/losses/grpo.py` share: options, a batch with every optional tensor."""

import math

import torch
from sequence_losses import random_log_probs, random_mask

from liger_trainer.kernels.losses.grpo import LOSS_TYPES, GRPOLoss

B, T = 5, 6
EVERY = [{"loss_type": n, **({"max_completion_length": 9} if n == "dr_grpo" else {})}
         for n in LOSS_TYPES]  # fmt: skip
CASES = [
    *EVERY,
    *({**o, "importance_sampling_level": "sequence"} for o in EVERY if o["loss_type"] != "vespo"),
    *({**o, "beta": 0.3} for o in EVERY),
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "luspo", "beta": 0.3, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.4},
    {"loss_type": "grpo", "epsilon_low": 0.1, "delta": 1.35},
    {"loss_type": "grpo", "delta": 1.05},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5,
     "vespo_lambda_neg": 2.5},
    *({**o, "off_policy_mask_threshold": 0.05} for o in EVERY[:2]),
    *({**o, "entropy_coef": 0.2} for o in EVERY),
]  # fmt: skip
EXTRAS = [(), ("old_log_probs",), ("old_log_probs", "top_entropy_mask"),
          ("old_log_probs", "importance_sampling_ratio"),
          ("old_log_probs", "sampling_log_probs")]  # fmt: skip


RLOO = [{}, {"epsilon_low": 0.5, "epsilon_high": 0.9}]


def name_of(given: dict) -> str:
    return "-".join(str(v) for v in given.values())


def make_batch():
    """Return (log_probs, mask, advantages, every optional tensor by name)."""
    log_probs, mask = random_log_probs(B, T), random_mask(B, T)
    mask[3] = False  # a completion that is left out
    advantages = torch.tensor([1.3, -0.8, 0.0, 2.0, -1.7], dtype=torch.float64)
    near = [log_probs + 0.5 * torch.randn(B, T, dtype=torch.float64) for _ in range(3)]
    near[2][1, :2] = math.nan  # the sampler did not tell
    return log_probs, mask, advantages, {
        "old_log_probs": near[0],
        "ref_log_probs": near[1],
        "sampling_log_probs": near[2],
        "entropy": torch.rand(B, T, dtype=torch.float64),
        "top_entropy_mask": torch.rand(B, T) < 0.6,
        "importance_sampling_ratio": (0.3 * torch.randn(B, T, dtype=torch.float64)).exp(),
    }  # fmt: skip


def needed(loss: GRPOLoss, others: dict, extras=("old_log_probs",)) -> dict:
    names = {*extras, *(["ref_log_probs"] if loss.beta else []), "entropy"}
    return {name: others[name] for name in others if name in names}
