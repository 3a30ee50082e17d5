"""The adapter's GEMMs in a LoRA layer: of a wide operand (x or dy) and narrow ones (A, B, h).

N is rows, R an adapter's rank, I and K are widths. There are three implementations:

- `InDtype`: torch's GEMMs, after a cast of all operands to one dtype.
- `lora_in_registers.InRegisters`: Triton kernels that split or round the narrow operands as they
  load them. They need fewer calls, which is what counts where the host is the limit.
- `lora_in_parts.InParts`: cuBLAS GEMMs of narrow operands that were split beforehand. For large
  inputs and high ranks, where too many programs would split the same operands.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ..runtime import use_triton
from .lora_in_parts import InParts, matmul_fp32
from .lora_in_registers import InRegisters

_LARGE = 1 << 29  # elements of x times rank: from here on the device is the limit


class Products(Protocol):
    """The GEMMs of one adapter."""

    def add_product(
        self, y_NK, x_NI, first_RI, second_RK, scale: float, beta: int = 1
    ) -> torch.Tensor:
        """Set y = beta y + h second, where h = scale x firstᵀ [N, R]. Return h.

        y may be None, if h alone is wanted.
        """
        ...

    def gradient_a(self, dh_NR, x_NK) -> torch.Tensor:
        """Return dhᵀ x [R, K], in fp32 or the adapter's dtype."""
        ...

    def gradient_b(self, dy_NK, h_NR) -> torch.Tensor:
        """Return dyᵀ h [K, R], in fp32 or the adapter's dtype."""
        ...


class InDtype(NamedTuple):
    """All operands are cast to `dtype`."""

    dtype: torch.dtype

    def add_product(self, y_NK, x_NI, first_RI, second_RK, scale, beta=1):
        x_NI, first_RI = x_NI.to(self.dtype), first_RI.to(self.dtype)
        h_NR = torch.addmm(x_NI.new_empty(1), x_NI, first_RI.t(), beta=0, alpha=scale)
        if y_NK is not None and y_NK.dtype == self.dtype:
            y_NK.addmm_(h_NR, second_RK.to(self.dtype), beta=beta)
        elif y_NK is not None:
            product = h_NR @ second_RK.to(self.dtype)
            y_NK.add_(product) if beta else y_NK.copy_(product)
        return h_NR

    def gradient_a(self, dh_NR, x_NK):
        return self._over_rows(dh_NR, x_NK.to(self.dtype))

    def gradient_b(self, dy_NK, h_NR):
        return self._over_rows(dy_NK.to(self.dtype), h_NR)

    @staticmethod
    def _over_rows(a_NI, b_NJ):
        if a_NI.is_cuda and a_NI.element_size() == 2:
            return matmul_fp32(a_NI.t(), b_NJ)
        return torch.mm(a_NI.t(), b_NJ)


def products_for(
    x: torch.Tensor, y_dtype: torch.dtype, A: torch.Tensor, autocast: bool
) -> Products:
    """Return how the products of x, y and an adapter's matrices are computed.

    Under autocast, x already has its dtype, and the adapter's matrices are rounded to it.
    """
    dtype = x.dtype if autocast else A.dtype
    is_16_bit = x.element_size() == 2 and x.dtype == y_dtype
    if is_16_bit and x.numel() and use_triton(x):
        large = x.numel() * A.shape[0] >= _LARGE
        exact = x.dtype == torch.bfloat16 and dtype == torch.float32
        if exact:
            return InParts() if large else InRegisters(exact=True)
        if dtype == x.dtype and not large:
            return InRegisters(exact=False)
    return InDtype(dtype)
