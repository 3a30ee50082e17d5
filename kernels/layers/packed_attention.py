"""Causal attention within the documents of packed rows, without a mask.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j   over j <= i in the document of i,
                                                   and i - j < window if there is one

Tokens are counted through the batch: row b, position t is token b T + t. A document is a run of
tokens within a row; document n is [bounds[n], bounds[n + 1]). Time and memory grow with the sum of
the squared lengths of documents, not with T^2.

Shapes: q [B, Hq, T, D], k and v [B, Hk, T, D], Hq a multiple of Hk; bounds [N + 1], int32, from 0
to B T.
Dtypes: bf16 and fp16 on a GPU by torch's own variable-length FlashAttention; anything else by
`packed_attention_reference`.

Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..runtime import pays

LARGEST_HEAD = 256  # of torch's FlashAttention


class Documents(NamedTuple):
    """The boundaries [N + 1] of N documents, int32, and the length of the longest."""

    bounds: torch.Tensor
    longest: int


def one_per_row(rows: int, length: int, device: torch.device) -> Documents:
    """Return the documents of rows that hold one each. The host does not wait for the device."""
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    return Documents(bounds, length)


def documents_of(position_ids: torch.Tensor) -> Documents:
    """Return the documents of packed rows, from `position_ids` [B, T], T > 0.

    A document ends where the ids do not increase by one. The host waits for the device once,
    because the number of documents determines a tensor's size.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    torch.ne(position_ids.diff(dim=1), 1, out=starts[:, 1:])
    first = starts.flatten().nonzero().flatten()
    bounds = F.pad(first, (0, 1), value=position_ids.numel()).to(torch.int32)
    return Documents(bounds, int(bounds.diff().max()))


def dense_mask(documents: Documents, rows: int, window: int | None = None) -> torch.Tensor:
    """Return a mask [B, 1, T, T], True where a query (third dimension) sees a key (fourth)."""
    bounds = documents.bounds
    lengths = bounds.diff().long()
    document = torch.arange(len(lengths), device=bounds.device).repeat_interleave(lengths)
    document = document.view(rows, 1, -1)
    place = torch.arange(document.shape[-1], device=bounds.device)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (document[..., :, None] == document[..., None, :])
    return seen if window is None else seen & (distance < window)


def packed_attention_reference(q, k, v, documents, window=None, scale=None):
    """Compute `packed_attention` in plain torch, with the mask."""
    mask = dense_mask(documents, q.shape[0], window)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def runs_here(x: torch.Tensor) -> bool:
    """Return whether to use attention without a mask on the device of `x`.

    On a CPU only the masked reference exists. It runs for the probe, in tests and when compiled.
    """
    return x.is_cuda or pays(x, sys.maxsize)


def has_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether torch's FlashAttention takes such tensors, and is enabled."""
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD
    return q.is_cuda and half and fits and torch.backends.cuda.flash_sdp_enabled()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """View [B, H, T, D] as [B T, H, D]; copies unless x is a transposed view of a projection."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention of each token to itself and to the tokens before it in its document.

    Args:
        q: [B, Hq, T, D], any strides; usually a transposed view of [B, T, Hq, D].
        k, v: [B, Hk, T, D].
        documents: from `documents_of` or `one_per_row`.
        window: how many tokens each token attends to, itself included; None is all.
        scale: factor of q . k; None is D^-0.5.

    Returns [B, T, Hq, D], ready for the output projection. Differentiable once.

    Raises ValueError if the shapes do not fit each other.
    """
    (B, Hq, T, D), Hk = q.shape, k.shape[1]
    if not (k.shape == v.shape == (B, Hk, T, D)) or Hq % Hk:
        raise ValueError(
            "packed_attention: q must be [B, Hq, T, D], k and v [B, Hk, T, D] with Hq a multiple "
            f"of Hk, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not has_kernel(q, k, v):
        return packed_attention_reference(q, k, v, documents, window, scale)
    # What `torch.nn.attention.varlen.varlen_attn` calls. That function is a Python operator with a
    # Python backward, whose host cost exceeds the device time of short rows.
    out = torch.ops.aten._flash_attention_forward(
        _tokens(q), _tokens(k), _tokens(v), documents.bounds, documents.bounds,
        documents.longest, documents.longest, 0.0, window is None, False, scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out.view(B, T, Hq, D)
