"""A linear head with a loss, in one operation that never holds all logits."""

from .cross_entropy import linear_cross_entropy
from .divergence import linear_divergence
from .log_prob_loss import linear_log_prob_loss, pairs
from .log_probs import linear_log_probs

__all__ = [
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_prob_loss",
    "linear_log_probs",
    "pairs",
]
