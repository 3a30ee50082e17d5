"""Avoid building attention masks for plain causal rows, packed rows and sliding windows.

transformers builds a mask whenever it cannot tell that rows are plain. To see that nothing is
packed, it reads the position ids back from the device. While compiling it cannot read them, so
compiled models attend through a [T, T] mask. But if a forward gets no position ids, nothing is
packed, and a packed or windowed row is described by where its documents begin.

The functions that build masks are globals of the model's source file. As for the rotary function,
the module gets its own forward, the same code with these names bound to ours (`swap.rebind`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType

import torch
from torch import nn

from liger_trainer.deferred import Deferred
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.kernels.layers.packed_attention import (
    Documents,
    dense_mask,
    documents_of,
    one_per_row,
    runs_here,
)
from liger_trainer.kernels.runtime import every_size, is_transformed
from liger_trainer.source import rebind, referenced_globals
from liger_trainer.swap import Swapped, while_current

_MASK_MODULE = "transformers.masking_utils"
_MAKERS = {"create_causal_mask": False, "create_sliding_window_causal_mask": True}  # windowed?
# Arguments of a maker that leave the rows causal; any other must be None.
_CAUSAL_ARGUMENTS = {
    "config",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "allow_is_causal_skip",
    "layer_idx",
}


class PackedMask(Deferred):
    """The mask [B, 1, T, T] of packed or windowed rows, of which attention reads only the bounds.

    Any other use of it gets the mask that transformers makes.
    """

    documents: Documents
    window: int | None
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, inputs_embeds, documents: Documents, window: int | None, make: Callable):
        B, T = inputs_embeds.shape[:2]
        mask = cls((B, 1, T, T), torch.bool, inputs_embeds.device)
        mask.documents, mask.window, mask.make = documents, window, make
        return mask

    def compute(self) -> torch.Tensor:
        return self.make()


class LeanMasks(Swapped):
    """A module whose forward builds masks through `lean` versions of transformers' functions."""

    @classmethod
    def namespace(cls, base: type) -> dict[str, object]:
        original = base.forward
        parameters = list(inspect.signature(original).parameters)
        at = parameters.index("position_ids") - 1 if "position_ids" in parameters else sys.maxsize
        plain, packing = (_with_lean_makers(original, packs) for packs in (False, True))

        @functools.wraps(original)
        def forward(self, *args, **kwargs):
            given = kwargs.get("position_ids") if len(args) <= at else args[at]
            return (plain if given is None else packing)(self, *args, **kwargs)

        return {"forward": while_current(base, forward)}


def _with_lean_makers(forward: FunctionType, packs: bool) -> FunctionType:
    for maker in _makers(forward):
        forward = rebind(forward, maker, lean(maker, packs)) or forward
    return forward


def _makers(forward: FunctionType) -> list[FunctionType]:
    return [
        g
        for g in referenced_globals(forward)
        if isinstance(g, FunctionType) and g.__module__ == _MASK_MODULE and g.__name__ in _MAKERS
    ]


@functools.cache
def lean(maker: FunctionType, packs: bool) -> Callable:
    """Return a version of `maker` that returns None for plain causal rows, else a PackedMask.

    Args:
        maker: transformers' function for causal or for sliding-window causal masks.
        packs: whether the position ids may restart within a row. Otherwise they are the model's
            own, which never restart.

    It calls `maker` for padding, a cache, overlays and attention other than sdpa, and while it is
    traced also for everything that depends on values.
    """
    sliding = _MAKERS[maker.__name__]

    @functools.wraps(maker)
    def make(*args, **kwargs):
        if args or is_transformed() or not _is_causal(kwargs):
            return maker(*args, **kwargs)
        embeddings, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        B, T = embeddings.shape[:2]
        window = kwargs["config"].sliding_window if sliding else None
        if sliding and window is None:
            return maker(**kwargs)
        documents = None
        if kwargs.get("attention_mask") is not None:
            if not _is_full(kwargs["attention_mask"], T):
                return maker(**kwargs)
            kwargs["attention_mask"] = kwargs["position_ids"] = None  # a mask forbids packing
        elif not packs:
            kwargs["position_ids"] = None
        elif positions is not None:
            if not _readable(positions):
                return maker(**kwargs)
            documents = _documents(positions, B)
            if len(documents.bounds) == B + 1:
                documents = None
        if documents is None and (window is None or window >= T):
            return None
        if torch.compiler.is_compiling() or not runs_here(embeddings):
            return maker(**kwargs)
        if documents is None:
            documents = one_per_row(B, T, embeddings.device)
        kwargs["inputs_embeds"] = embeddings.new_empty(B, T, 0)  # the maker reads only its shape
        return PackedMask.of(embeddings, documents, window, functools.partial(maker, **kwargs))

    return make


def _is_causal(kwargs: dict) -> bool:
    """Return whether the arguments request the causal mask of a batch without a cache."""
    config, embeddings = kwargs.get("config"), kwargs.get("inputs_embeds")
    positions = kwargs.get("position_ids")
    return (
        embeddings is not None
        and embeddings.shape[1] > 1
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "is_causal", True)
        and kwargs.get("allow_is_causal_skip", True)
        and all(value is None for name, value in kwargs.items() if name not in _CAUSAL_ARGUMENTS)
        and (positions is None or positions.dim() == 2)
    )


def _readable(tensor: torch.Tensor) -> bool:
    """Return whether values can be read; they cannot while a graph is traced or captured."""
    tracing = torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta
    return not (tracing or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


def note_full(attention_mask: torch.Tensor | None) -> None:
    """Record whether a batch [B, T] has no padding, for a compiled forward, which cannot read it.

    Trainers call this before every forward. The host waits for the device, as it also does in eager
    mode. Compiled code depends on the answer: one graph serves batches without padding, whose
    attention takes no mask, and another serves batches with padding.
    """
    if attention_mask is not None and attention_mask.dim() == 2 and _readable(attention_mask):
        attention_mask._liger_full = bool(attention_mask.all())


def _is_full(attention_mask: torch.Tensor, length: int) -> bool:
    """Return whether a mask is known to admit every token of rows of `length`."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return False
    if _readable(attention_mask):
        return bool(attention_mask.all())
    return getattr(attention_mask, "_liger_full", False)


def _documents(position_ids: torch.Tensor, rows: int) -> Documents:
    """Return `documents_of(position_ids)`, computed once per tensor."""
    if position_ids.is_inference():  # such a tensor has no version counter
        return documents_of(position_ids.expand(rows, -1))
    known, key = getattr(position_ids, "_liger_documents", None), (position_ids._version, rows)
    if known is None or known[0] != key:
        known = key, documents_of(position_ids.expand(rows, -1))
        position_ids._liger_documents = known
    return known[1]


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose lean masks for a module whose forward builds attention masks."""
    forward = getattr(type(module), "forward", None)
    makers = _makers(forward) if isinstance(forward, FunctionType) else []
    if not makers:
        return None
    if not search.config.attention:
        return Proposal.off(site, "attention")
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if name != "sdpa":
        reason = f"attention implementation {name}: only sdpa is given masks that can be spared"
        return Proposal.not_applicable(site, "attention", reason)
    reason = search.cached(("masks", *makers), lambda: difference(makers, config))
    if reason:
        return Proposal.refused(site, "attention", reason)
    swap = Swap(module, LeanMasks)
    return Proposal.swapped(site, "attention", "no masks for causal rows", swap)


_CACHES = ("cache", "past_key_values")  # the argument's name in transformers 5.24, and before


def difference(makers: list[FunctionType], config) -> str | None:
    """Return where lean masks differ from those of the installed transformers, or None."""
    config = copy.copy(config)
    config.sliding_window = 3
    counted = torch.arange(7).expand(2, -1)
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
    for maker in makers:
        for packs, position_ids in ((False, counted), (True, counted), (True, restarting)):
            batch = {
                "config": config,
                "inputs_embeds": torch.zeros(2, 7, 4),
                "attention_mask": None,
                "position_ids": position_ids,
            }
            batch |= {n: None for n in _CACHES if n in inspect.signature(maker).parameters}
            try:
                expected = maker(**batch)
            except TypeError as error:  # this version takes other arguments
                return f"{maker.__name__}: {error}"
            with every_size():
                got = lean(maker, packs)(**batch)
            if got is None:
                got = PackedMask.of(batch["inputs_embeds"], one_per_row(2, 7, "cpu"), None, None)
            if expected is None:
                expected = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
            if not torch.equal(dense_mask(got.documents, 2, got.window), expected):
                return f"{maker.__name__} makes another mask than expected"
    return None
