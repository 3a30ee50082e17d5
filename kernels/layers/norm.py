"""What RMSNorm and LayerNorm share: what the kernels take, their tiles, the checks of input."""

from __future__ import annotations

import functools

import torch

from ..runtime import next_power_of_2, use_triton

MAX_H = 65536  # widest row
MIN_ELEMENTS = 1 << 24  # below this, torch's fused norms take less of the host's time
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Largest BLOCK_H, elements of a tile (its rows are elements / BLOCK_H), warps.
FWD_TILES = ((4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16), (MAX_H, 16384, 32))


@functools.lru_cache
def tile(H: int, tiles: tuple) -> tuple:
    """Return BLOCK_R, BLOCK_H, and the further columns of the table's row for this width."""
    BLOCK_H = next_power_of_2(H)
    _, elements, *rest = next(tile for tile in tiles if tile[0] >= BLOCK_H)
    return max(1, elements // max(BLOCK_H, 64)), BLOCK_H, *rest


def has_kernel(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Return whether the Triton kernels take these; fp64 and rows wider than MAX_H use torch."""
    fits = all(t is None or t.dtype in _DTYPES for t in (x, *parameters))
    return fits and use_triton(x) and 0 < x.shape[-1] <= MAX_H


def check_input(norm: str, x: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """Raise ValueError unless x is [..., H], each parameter is [H] on x's device, and all float."""
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"{norm}: x is {x.dtype} {tuple(x.shape)}; needs floating point [..., H]")
    for name, p in parameters.items():
        if p is None:
            continue
        if p.shape != x.shape[-1:] or not p.is_floating_point():
            raise ValueError(
                f"{norm}: {name} is {p.dtype} {tuple(p.shape)};"
                f" needs floating point ({x.shape[-1]},) for x {tuple(x.shape)}"
            )
        if p.device != x.device:
            raise ValueError(f"{norm}: {name} is on {p.device}, x on {x.device}; move one")
