"""The formula of every alignment loss, on log-probabilities of tokens."""

from .advantages import group_advantages, leave_one_out_advantages
from .dpo import DPOLoss
from .grpo import GRPOLoss, RLOOLoss
from .kto import KTOLoss, mismatched_kl
from .reference_free import CPOLoss, ORPOLoss

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "GRPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "RLOOLoss",
    "group_advantages",
    "leave_one_out_advantages",
    "mismatched_kl",
]
