"""Helpers shared by the losses on sequences: masked sums, counts, checks.

The losses of alignment training (`dpo`, `reference_free`, `kto`, `grpo`) read log p_t, the
log-probability that the model gives the token at position t, for T positions per sequence. `mask`
is True at the tokens that a loss covers; values elsewhere have no influence and gradient 0.
All of it is plain torch in the dtype of the log-probabilities, fp32 or fp64, and never waits for
the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

EXP_BOUND = 80.0
"""The bound of exponents: fp32 can represent e^80, with room for a coefficient."""


def bounded_exp(exponent: torch.Tensor, bound: float = EXP_BOUND) -> torch.Tensor:
    """Return exp(min(exponent, bound)), which is never inf, with gradient 0 beyond the bound."""
    return exponent.clamp(max=bound).exp()


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `values` where `mask` is True, else 0 with gradient 0, even for NaN."""
    return torch.where(mask, values, 0.0)


def lengths(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the number of tokens of each sequence [...] of `mask` [..., T], at least 1."""
    return mask.sum(-1).clamp_min(1).to(dtype)


def sequence_log_probs(
    log_probs: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None = None
) -> torch.Tensor:
    """Return the log-probability [...] of each sequence: the sum of `log_probs` [..., T].

    With `ld_alpha` (LD-DPO, arXiv:2409.06411, for pairs [..., 2, T]), tokens beyond the length of
    the pair's shorter sequence are multiplied by `ld_alpha`: 1 changes nothing, 0 drops them. The
    reference's log-probabilities must be summed with the same `ld_alpha`.
    """
    log_probs = masked(log_probs, mask)
    if ld_alpha is None:
        return log_probs.sum(-1)
    if log_probs.dim() < 2 or log_probs.shape[-2] != 2:
        raise ValueError(
            f"ld_alpha compares the two sequences of a pair: log_probs must be [..., 2, T], got "
            f"{tuple(log_probs.shape)}"
        )
    shared = mask.sum(-1).amin(-1)[..., None, None]
    return log_probs.where(mask.cumsum(-1) <= shared, ld_alpha * log_probs).sum(-1)


def tokens_per_group(mask_GT: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the mean number of tokens per group of the whole batch, a scalar.

    The negative log-likelihood averaged over the batch's tokens is the mean over groups of each
    group's sum divided by this number. If a batch is processed in parts, every part needs the
    number of the whole batch. A batch without tokens counts as one token.
    """
    return mask_GT.sum().clamp_min(1).to(dtype) / mask_GT.shape[0]


def batch_nll(
    log_probs_GT: torch.Tensor, mask_GT: torch.Tensor, per_group: torch.Tensor | float | None
) -> torch.Tensor:
    """Return losses [G] whose mean over groups is the batch's mean negative log-likelihood.

    `per_group` is `tokens_per_group` of the batch; None if these groups are the whole batch.
    """
    if per_group is None:
        per_group = tokens_per_group(mask_GT, log_probs_GT.dtype)
    return -masked(log_probs_GT, mask_GT).sum(-1) / per_group


def check_sequences(log_probs: torch.Tensor, mask: torch.Tensor, shape: str) -> None:
    """Raise ValueError unless `log_probs` is fp32 or fp64 of `shape` (in "[G, 2, T]" a number is an
    exact size), and `mask` is a bool tensor of the same shape on the same device."""
    sizes = shape.strip("[]").split(", ")
    got = tuple(log_probs.shape)
    fits = len(got) == len(sizes) and all(
        not name.isdigit() or int(name) == size for name, size in zip(sizes, got, strict=True)
    )
    if not fits:
        raise ValueError(f"log_probs must be {shape}, got {got}")
    if log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_probs are {log_probs.dtype}; sums over a sequence need log_probs.float()"
        )
    check_like("mask", mask, log_probs.shape, log_probs.device)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; give mask.bool()")


def check_like(
    name: str, tensor: torch.Tensor | None, shape: Iterable[int], device: torch.device
) -> None:
    """Raise ValueError unless `tensor` is given, has `shape` and is on `device`."""
    shape = tuple(shape)
    if tensor is None:
        raise ValueError(f"{name} is needed, a tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, log_probs on {device}; move them together")


def check_name(option: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{option} {value!r} is unknown; known are {', '.join(known)}")


def check_range(
    option: str,
    value: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ValueError unless `value` is None, or finite and between `low` and `high`.

    A bound is included unless it is open.
    """
    if value is None:
        return
    inside = low <= value <= high and abs(value) < math.inf
    if not inside or (open_low and value == low) or (open_high and value == high):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{option} must lie in {left}{low:g}, {high:g}{right}, got {value}")


def check_unused(options: Any, used_by: Mapping[str, Iterable[str]], chosen: Iterable[str]) -> None:
    """Raise ValueError if a field of the dataclass `options` is set (differs from its default), but
    no loss of `chosen` uses it according to `used_by`."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        users = used_by.get(field.name)
        if users is None or value is None or value == field.default:
            continue
        if not set(users) & set(chosen):
            raise ValueError(
                f"{field.name}={value!r} has no effect on loss_type {', '.join(chosen)}: leave it "
                f"out, or choose from {', '.join(sorted(users))}"
            )
