"""The loss of one token from its logits: formula, options, torch reference, reductions.

For one token with logits z [V], label c, class weights w [V] (1 when absent) and

    y = softcap * tanh(scale * z / softcap)      (y = scale * z without softcap)
    lse = log(sum_v exp(y_v))

    loss = (1 - eps) * w_c * (lse - y_c)  +  eps / V * sum_v w_v * (lse - y_v)  +  z_loss * lse**2

where eps is the label smoothing (Szegedy et al., 2016, arXiv:1512.00567; the same definition as
`torch.nn.functional.cross_entropy`), z_loss the weight of the log-normalizer penalty (PaLM,
arXiv:2204.02311) and softcap the tanh bound of Gemma 2 (arXiv:2408.00118). A token whose label is
`ignore_index` has loss 0 and gradient 0; one whose label lies outside [0, V) has loss NaN.

Shapes: N tokens, V vocabulary. The reference computes in fp32, or in fp64 for fp64 logits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The loss of one token; see the module's docstring for the formula."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        if not abs(self.scale) < float("inf"):  # math.isfinite does not compile in torch 2.11
            raise ValueError(f"scale must be finite, got {self.scale}")


def transform_logits(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """y of the formula, in the dtype of `logits`."""
    if options.softcap is not None:
        return options.softcap * torch.tanh(logits * (options.scale / options.softcap))
    return logits * options.scale if options.scale != 1.0 else logits


def cross_entropy_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_V: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Loss per token [N] in fp32 (fp64 for fp64 logits), differentiable in the logits."""
    y_NV = transform_logits(logits_NV.to(accumulate_dtype(logits_NV)), options)
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


def accumulate_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


REDUCTIONS = ("none", "sum", "mean")


def check_labels(labels: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raises ValueError unless `labels` is an int64 tensor of `shape` on `device`."""
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 class indices, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device}, logits on {device}; move them together")


def checked_weights(
    class_weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    labels: torch.Tensor,
    vocab: int,
    ignore_index: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(class weights [V], token weights [N] in `dtype`); ValueError if one does not fit.

    Ignored tokens get the weight 0, so that a NaN there cannot reach the loss.
    """
    if class_weight is not None:
        if class_weight.shape != (vocab,) or class_weight.device != labels.device:
            raise ValueError(
                f"class_weight must be ({vocab},) on {labels.device}, got "
                f"{tuple(class_weight.shape)} on {class_weight.device}"
            )
        class_weight = class_weight.contiguous()
    if token_weight is not None:
        if token_weight.shape != labels.shape or token_weight.device != labels.device:
            raise ValueError(
                f"token_weight must be {tuple(labels.shape)} like the labels, on {labels.device}, "
                f"got {tuple(token_weight.shape)} on {token_weight.device}"
            )
        token_weight = token_weight.reshape(-1).to(dtype)
        token_weight = token_weight.where(labels.reshape(-1) != ignore_index, 0.0)
    return class_weight, token_weight


def reduce_loss(
    loss_N: torch.Tensor,
    reduction: str,
    count: torch.Tensor,
    token_weight_N: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Reduces per-token losses; `count` is what "mean" divides by, at least 1 (no tokens: 0)."""
    if token_weight_N is not None:
        loss_N = loss_N * token_weight_N.to(loss_N.dtype)
    if reduction == "none":
        return loss_N
    return scale_sum(loss_N.sum(), reduction, count, num_items_in_batch)


def scale_sum(total, reduction, count, num_items_in_batch):
    """Divides a summed loss by `num_items_in_batch` if given, else for "mean" by `count`."""
    if num_items_in_batch is not None:
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    return total / count.to(total.dtype) if reduction == "mean" else total


def mean_denominator(
    labels_N: torch.Tensor, class_weight_V: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Supervised tokens, or the sum of their class weights; 1 where there are none."""
    supervised_N = labels_N != ignore_index
    if class_weight_V is None:
        return supervised_N.sum().clamp_min(1)
    in_range_N = supervised_N & (labels_N >= 0) & (labels_N < class_weight_V.shape[0])
    weights_N = class_weight_V.double()[labels_N.where(in_range_N, 0)].where(in_range_N, 0.0)
    total = weights_N.sum()
    return total.where(supervised_N.any(), 1.0)
