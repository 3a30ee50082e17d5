"""The head call behind deferred logits: its weights and modes, and whether they are still valid."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from liger_trainer.deferred.scope import Scope

WAY_OUT = (
    "Do it with logits of a forward without labels (or outside loss_scope()), set "
    "fused_linear_cross_entropy to false in liger_kernel_config, or call restore(model)."
)


class Seen(NamedTuple):
    """A weight or bias of the head as it was at the head's call, and what tells of its change."""

    layer: nn.Module
    name: str
    tensor: torch.Tensor
    requires_grad: bool
    stamp: tuple | None

    @property
    def was_exchanged(self) -> bool:
        """Whether an engine has put a shard in its place since."""
        current = _tensor_of(self.layer, self.name)
        replaced = current is not None and type(current) is not DTensor
        return replaced and current.shape != self.tensor.shape

    @property
    def was_changed(self) -> bool:
        if self.tensor.is_meta:  # offloaded: what it stands for is not looked at
            return False
        current = _tensor_of(self.layer, self.name)
        if current is not self.tensor and type(current) is not DTensor and not self.was_exchanged:
            return True
        return _differs(self.tensor, self.stamp)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The call of a head that made the logits."""

    head: nn.Module
    hidden: torch.Tensor
    device: torch.device  # where the head is, which need not be where its input is
    dtype: torch.dtype  # of the head's GEMMs
    fused: bool  # the loss is fused with the head; else it gets the plain logits
    scope: Scope
    with_grad: bool
    autocast: tuple[bool, torch.dtype]
    seen: tuple[Seen, ...] = dataclasses.field(repr=False)
    hidden_stamp: tuple | None
    consumers: list = dataclasses.field(default_factory=list)  # who got gradients past the logits

    @contextlib.contextmanager
    def as_then(self):
        """Restore the grad mode, autocast and weights of the call within the block."""
        enabled, dtype = self.autocast
        with (
            torch.set_grad_enabled(self.with_grad),
            torch.autocast(self.hidden.device.type, dtype=dtype, enabled=enabled),
            self.weights(),
        ):
            yield

    @contextlib.contextmanager
    def weights(self):
        """Put back the weights of the call within the block, where an engine has put shards in
        their place (FSDP1)."""
        exchanged = [seen for seen in self.seen if seen.was_exchanged]
        if not all(_in_memory(seen.tensor) for seen in exchanged):
            raise RuntimeError(
                "The output head's weights were freed before its logits were used. Compute the "
                "loss in the model's forward, by giving it labels. " + WAY_OUT
            )
        shards = [(s.layer._parameters, s.name, s.layer._parameters[s.name]) for s in exchanged]
        try:
            for seen in exchanged:
                seen.layer._parameters[seen.name] = seen.tensor
            yield
        finally:
            for parameters, name, shard in shards:
                parameters[name] = shard

    def check(self) -> None:
        """Raise RuntimeError if the logits would not be those of the time of the call.

        While the scope is open nothing can have changed. Afterwards version counters tell of
        in-place changes, and elements of each row of those that these miss (fused optimizers,
        writes to `.data`).
        """
        if self.scope.open:
            return
        tracked = self.with_grad and torch.is_grad_enabled()
        if tracked and any(s.tensor.requires_grad != s.requires_grad for s in self.seen):
            raise RuntimeError(
                "These logits were not computed during the forward, and weights of the output head "
                "have been frozen or unfrozen since. Read outputs.logits before that. " + WAY_OUT
            )
        hidden_differs = _differs(self.hidden, self.hidden_stamp)
        if hidden_differs or any(s.was_changed for s in self.seen):
            raise RuntimeError(
                "These logits were not computed during the forward, and the weights or hidden "
                "states that they are made of have changed since (an optimizer step?). Read "
                "outputs.logits before the change. " + WAY_OUT
            )

    def operands(self) -> list[torch.Tensor]:
        """Parameters by which the logits hang in the autograd graph.

        A search for unused parameters must find them. But a parameter waits for all gradients that
        the graph announces, and where hooks gather the head's weights for its backward alone, it
        must not wait for longer; nor do shards belong there, an engine puts the whole parameter in
        their place. So these are left out, unless nothing else requires a gradient.
        """
        layers = [self.head, *(seen.layer for seen in self.seen)]
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        tensors = (seen.tensor for seen in self.seen) if self.seen else self.head.parameters()
        wanted = [p for p in tensors if p.requires_grad]
        in_memory = [p for p in wanted if p.numel() and not p.is_meta]
        whole = [p for p in in_memory if not isinstance(p, DTensor) and not hooked]
        return whole if whole or self.hidden.requires_grad else wanted


def seen_in(head: nn.Module) -> tuple[Seen, ...]:
    """Return the weights and biases of the head's linear layers, as they are."""
    found = []
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            for name in ("weight", "bias"):
                tensor = _tensor_of(layer, name)
                if tensor is not None:
                    found.append(Seen(layer, name, tensor, tensor.requires_grad, stamp_of(tensor)))
    return tuple(found)


def device_of(head: nn.Module, hidden: torch.Tensor) -> torch.device:
    """Where `head(hidden)` will lie: its weights may be on another device, or offloaded."""
    placed = next((t for t in head.parameters() if not t.is_meta), hidden).device
    hook = vars(head).get("_hf_hook")  # of accelerate, which moves input and weights
    target = getattr(hook, "execution_device", None)
    if target is None:
        return placed
    return torch.device(placed.type, target) if isinstance(target, int) else torch.device(target)


def _tensor_of(layer: nn.Linear, name: str) -> torch.Tensor | None:
    """`layer.weight` or `.bias`, without asking for it: ZeRO-3 answers that by gathering."""
    found = layer._parameters.get(name)
    return vars(layer).get(name) if found is None else found


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEW = 4


def stamp_of(tensor: torch.Tensor) -> tuple | None:
    """Return version, address and a few elements of each row and column; None for shards and what
    is offloaded.

    Reading all elements would cost a pass over the head in every forward, and what changes them
    behind autograd's back (fused optimizers, writes to `.data`) changes whole rows.
    """
    if not tensor.numel() or tensor.is_meta or isinstance(tensor, DTensor):
        return None
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    if bits.dim() < 2:
        return tensor._version, tensor.data_ptr(), (bits.clone(),)
    rows, columns = (max(1, n // _FEW) for n in bits.shape[-2:])
    samples = bits[..., ::columns].clone(), bits[..., ::rows, :].clone()
    return tensor._version, tensor.data_ptr(), samples


def _differs(tensor: torch.Tensor, stamp: tuple | None) -> bool:
    if stamp is None or not _in_memory(tensor):
        return False
    (*before, samples), (*after, samples_now) = stamp, stamp_of(tensor)
    return before != after or not all(map(torch.equal, samples, samples_now))


def _in_memory(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().size() > 0
