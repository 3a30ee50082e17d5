"""Attention through transformers' interface, with the bounds of a PackedMask in place of the mask.

A module's forward gets its attention function from a global of its source file, an
AttentionInterface. The module gets its own forward, the same code with that name bound to an
interface whose `sdpa` knows packed masks (`swap.rebind`) and which passes on everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from liger_trainer.injection import probe
from liger_trainer.injection.rules.masks import PackedMask
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.kernels.layers.packed_attention import (
    LARGEST_HEAD,
    documents_of,
    has_kernel,
    packed_attention,
    packed_attention_reference,
    runs_here,
)
from liger_trainer.source import rebind, referenced_globals
from liger_trainer.swap import Swapped, while_current

# Arguments of an attention function that request more than a masked softmax.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "cache")


class Heads(NamedTuple):
    """Size and grouping of attention heads."""

    size: int
    per_key: int  # query heads that share a key head


class PackedAttention(Swapped):
    """A module whose forward gets its attention function from `Interface`.

    Key: the heads for which packed attention was verified.
    """

    @classmethod
    def namespace(cls, base: type, heads: Heads) -> dict[str, object]:
        original = _interface(base.forward)
        forward = rebind(base.forward, original, Interface(original, heads))
        return {"forward": while_current(base, forward)}


class Interface:
    """An AttentionInterface whose `sdpa` reads the bounds of packed masks.

    This holds only while `sdpa` is transformers' own function. Another one (for context
    parallelism, say) may depend on more than its arguments, so it is called as it is.
    """

    def __init__(self, original, heads: Heads):
        self._original = original
        self._by_bounds = by_bounds(sdpa_attention_forward, heads)

    @property
    def _sdpa(self):
        current = self._original["sdpa"]
        return self._by_bounds if current is sdpa_attention_forward else current

    def get_interface(self, name, default):
        return self._sdpa if name == "sdpa" else self._original.get_interface(name, default)

    def get(self, name, default=None):
        return self._sdpa if name == "sdpa" else self._original.get(name, default)

    def __getitem__(self, name):
        return self._sdpa if name == "sdpa" else self._original[name]

    def __getattr__(self, name):
        return getattr(self._original, name)


@functools.cache
def by_bounds(sdpa: Callable, heads: Heads) -> Callable:
    """Return an attention function like `sdpa` that reads the bounds of a PackedMask.

    It does so only for the `heads` that were verified, and for nothing beyond a masked softmax.
    """

    @functools.wraps(sdpa)
    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        if isinstance(attention_mask, PackedMask):
            if torch.is_autocast_enabled(query.device.type):  # as for torch's own attention
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = (t.to(dtype) for t in (query, key, value))
            rows, _, length, _ = attention_mask.shape
            whole = query.shape[0] == rows and query.shape[2] == key.shape[2] == length
            whole = whole and value.shape == key.shape
            plain = not dropout and all(kwargs.get(name) is None for name in _UNSUPPORTED)
            proven = heads == Heads(query.shape[-1], query.shape[1] // key.shape[1])
            fits = has_kernel(query, key, value) or not query.is_cuda
            # torch's function may have been replaced (context parallelism).
            is_torchs = F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
            if whole and plain and proven and fits and is_torchs:
                documents, window = attention_mask.documents, attention_mask.window
                out = packed_attention(query, key, value, documents, window=window, scale=scaling)
                return out, None
            attention_mask = attention_mask.materialize()
        return sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    return attend


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose packed attention for a module that gets its attention from an AttentionInterface."""
    if _interface(getattr(type(module), "forward", None)) is None:
        return None
    if not search.config.attention:
        return Proposal.off(site, "attention")
    device = _device(search, module)
    reason = _unfit(module, device)
    if reason:
        return Proposal.not_applicable(site, "attention", reason)
    heads = Heads(module.head_dim, getattr(module, "num_key_value_groups", 1))
    verdict = _probe(heads, device, torch.backends.cuda.flash_sdp_enabled())
    if not verdict.equal:
        return Proposal.refused(site, "attention", verdict.reason)
    swap = Swap(module, PackedAttention, (heads,))
    return Proposal.swapped(site, "attention", "packed rows and windows by their bounds", swap)


def _device(search: Search, module: nn.Module) -> torch.device:
    """Return where the module will run: a model may be injected before it moves to the GPU."""
    device = search.device_of(module)
    return torch.device("cuda") if torch.cuda.is_available() and device.type == "cpu" else device


def _unfit(module: nn.Module, device: torch.device) -> str | None:
    """Return why packed attention does not suit this module, or None.

    The heads that a module declares determine what is probed; `by_bounds` checks the actual ones.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    head_dim = getattr(module, "head_dim", None)
    if name != "sdpa":
        return f"attention implementation {name}"
    if not runs_here(torch.empty(0, device=device)):
        return "masked: without CUDA, torch has no attention of packed rows"
    if not isinstance(head_dim, int) or hasattr(module, "v_head_dim"):
        return "masked: queries and values of different size, or of none that the module names"
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        return f"masked: FlashAttention has no heads of {head_dim}"
    return None


def _interface(forward: object) -> object | None:
    """Return the AttentionInterface that a forward refers to."""
    if not isinstance(forward, FunctionType):
        return None
    found = referenced_globals(forward)
    return next((g for g in found if isinstance(g, AttentionInterface)), None)


@functools.cache
def _probe(heads: Heads, device: torch.device, has_flash: bool) -> probe.Verdict:
    """Compare attention by bounds and by mask, with and without a window.

    No model takes part in it, so it is done once per process.
    """
    length = 150  # more than one block of the kernel
    position_ids = torch.tensor([*range(1), *range(60), *range(length - 61)], device=device)
    documents = documents_of(position_ids.expand(2, -1))
    for window in (None, 20):
        options = {"documents": documents, "window": window, "scale": 0.7 * heads.size**-0.5}
        try:
            verdict = probe.compare(
                functools.partial(packed_attention_reference, **options),
                functools.partial(packed_attention, **options),
                _cases(length, heads, device),
            )
        except RuntimeError as error:  # the device has no kernel for these sizes
            return probe.Verdict(False, None, f"FlashAttention fails: {str(error)[:100]}")
        if not verdict.equal:
            return verdict
    return verdict


def _cases(length: int, heads: Heads, device: torch.device) -> Iterator[probe.Case]:
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (
            probe.draw((2, length, 2 * n, heads.size), 1.0, device, seed).to(dtype)
            for seed, n in enumerate((heads.per_key, 1, 1))
        )
        inputs = tuple(t.transpose(1, 2).requires_grad_() for t in (q, k, v))
        yield probe.Case(inputs, f"{dtype} heads of {heads.size}")
