"""What a model does to its logits before the softmax: formula, torch and Triton.

    y = softcap * tanh(scale * z / softcap) / temperature
    y = scale * z / temperature                                   if softcap is None

Softcap is the tanh bound of Gemma 2 (arXiv:2408.00118). The temperature divides both scale and
softcap, so two numbers remain.
"""

from __future__ import annotations

import dataclasses

import torch

from ..runtime import tl, triton


def accumulate_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `logits` are processed: fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclasses.dataclass(frozen=True)
class Transform:
    """y as a function of z; see the module's docstring for the formula."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        if self.softcap is not None and not 0.0 < self.softcap < float("inf"):
            raise ValueError(f"softcap must be positive and finite, or None, got {self.softcap}")
        if not abs(self.scale) < float("inf"):  # math.isfinite does not compile in torch 2.11
            raise ValueError(f"scale must be finite, got {self.scale}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def factor(self) -> float:
        """The factor of z: scale / temperature."""
        return self.scale / self.temperature

    @property
    def bound(self) -> float | None:
        """The bound of y: softcap / temperature."""
        return None if self.softcap is None else self.softcap / self.temperature

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return y in fp32, in fp64 for fp64 logits."""
        logits = logits.to(accumulate_dtype(logits))
        if self.bound is not None:
            return self.bound * torch.tanh(logits * (self.factor / self.bound))
        return logits * self.factor if self.factor != 1.0 else logits

    def chain_(self, grad: torch.Tensor, y: torch.Tensor) -> None:
        """Turn a gradient with respect to y into the gradient with respect to z, in place."""
        grad *= self.factor
        if self.bound is not None:
            grad *= 1 - (y / self.bound).square()

    @property
    def arguments(self) -> tuple[float, float, bool]:
        """The kernels' arguments (scale, softcap, HAS_SOFTCAP)."""
        return self.factor, self.bound or 1.0, self.bound is not None


@triton.jit
def transform(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return y for logits z in fp32; `scale` and `softcap` include the temperature."""
    y = z * scale
    if HAS_SOFTCAP:  # tanh(u) = 2 sigmoid(2u) - 1, exact in the limits and without overflow
        y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)
    return y


@triton.jit
def chain(grad, y, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the gradient with respect to z from the gradient with respect to y."""
    grad *= scale
    if HAS_SOFTCAP:
        ratio = y / softcap
        grad *= 1.0 - ratio * ratio
    return grad
