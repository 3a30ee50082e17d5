"""Tensors that are computed on first use, and the logits among them."""

from __future__ import annotations

from liger_trainer.deferred.scope import loss_scope
from liger_trainer.deferred.tensor import Attach, Deferred

__all__ = ["Attach", "Deferred", "loss_scope"]
