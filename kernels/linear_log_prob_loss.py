"""Former path of `liger_trainer.kernels.linear.linear_log_prob_loss`."""

from .linear import linear_log_prob_loss, pairs

__all__ = ["linear_log_prob_loss", "pairs"]
