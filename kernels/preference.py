"""Former path of `liger_trainer.kernels.losses.DPOLoss`."""

from .losses import DPOLoss

__all__ = ["DPOLoss"]
