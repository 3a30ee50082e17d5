"""From the losses of tokens to the loss of a batch: labels, weights, sums and means."""

from __future__ import annotations

import torch

REDUCTIONS = ("none", "sum", "mean")


def check_reduction(reduction: str, num_items_in_batch: torch.Tensor | int | None) -> None:
    """Raise ValueError for an unknown reduction, or a number of items that would divide no sum."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError('num_items_in_batch divides a sum: reduction must be "sum" or "mean"')


def check_labels(labels: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError unless `labels` is an int64 tensor of `shape` on `device`."""
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
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (class weights [V], token weights [N] in `dtype`); raise ValueError if one does not
    fit.

    Ignored tokens get the weight 0, so that a NaN there cannot reach the loss.
    """
    if class_weight is not None:
        if class_weight.shape != (vocab,) or class_weight.device != labels.device:
            raise ValueError(
                f"class_weight must be ({vocab},) on {labels.device}, got "
                f"{tuple(class_weight.shape)} on {class_weight.device}"
            )
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("class_weight requires a gradient, and none is computed: detach it")
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
    """Reduce the losses of tokens; "mean" divides by `count`, which is at least 1."""
    if token_weight_N is not None:
        loss_N = loss_N * token_weight_N.to(loss_N.dtype)
    if reduction == "none":
        return loss_N
    return scale_sum(loss_N.sum(), reduction, count, num_items_in_batch)


def scale_sum(total, reduction, count, num_items_in_batch):
    """Divide a summed loss by `num_items_in_batch` if given, else for "mean" by `count`."""
    if num_items_in_batch is not None:
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    return total / count.to(total.dtype) if reduction == "mean" else total


def mean_denominator(
    labels_N: torch.Tensor, class_weight_V: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Return the number of supervised tokens, or the sum of their class weights; 1 if there are
    none."""
    supervised_N = labels_N != ignore_index
    if class_weight_V is None:
        return supervised_N.sum().clamp_min(1)
    in_range_N = supervised_N & (labels_N >= 0) & (labels_N < class_weight_V.shape[0])
    weights_N = class_weight_V.double()[labels_N.where(in_range_N, 0)].where(in_range_N, 0.0)
    total = weights_N.sum()
    return total.where(supervised_N.any(), 1.0)


def masked_scale(g: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `g` where `mask` is True, else 0 (multiplying by the mask would keep a NaN)."""
    return torch.where(mask, g, torch.zeros((), dtype=g.dtype, device=g.device))


def scale_rows(x_NH: torch.Tensor, scale_N: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of `x_NH` multiplied by `scale_N` (fp32), rounded once."""
    if scale_N is None:
        return x_NH
    return torch.mul(x_NH, scale_N.unsqueeze(1), out=torch.empty_like(x_NH))
