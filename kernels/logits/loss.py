"""The loss of one token from its logits: formula, options, torch reference.

For one token with logits z [V], label c, class weights w [V] (1 when absent), y as in
`transform.py` (with temperature 1) and

    lse = log(sum_v exp(y_v))

    loss = (1 - eps) * w_c * (lse - y_c)  +  eps / V * sum_v w_v * (lse - y_v)  +  z_loss * lse**2

where eps is the label smoothing (Szegedy et al., 2016, arXiv:1512.00567; the same definition as
`torch.nn.functional.cross_entropy`) and z_loss the weight of the log-normalizer penalty (PaLM,
arXiv:2204.02311). A token whose label is `ignore_index` has loss 0 and gradient 0; one whose label
lies outside [0, V) has loss NaN.

Shapes: N tokens, V vocabulary. The reference computes in fp32, or in fp64 for fp64 logits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .transform import Transform


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of the loss of one token; the module's docstring has the formula."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        _ = self.transform  # this checks scale and softcap

    @property
    def transform(self) -> Transform:
        return Transform(self.scale, self.softcap)


def cross_entropy_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_V: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Return the loss of each token [N] in fp32 (fp64 for fp64 logits), differentiable in the
    logits."""
    y_NV = options.transform(logits_NV)
    loss_N = F.cross_entropy(
        y_NV,
        labels_N,
        weight=None if class_weight_V is None else class_weight_V.to(y_NV.dtype),
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    if options.z_loss:
        penalty_N = options.z_loss * torch.logsumexp(y_NV, -1).square()
        loss_N = loss_N + penalty_N.where(labels_N != options.ignore_index, 0.0)
    return loss_N
