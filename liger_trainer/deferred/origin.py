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


class Snapshot(NamedTuple):
    """A parameter of the head when the head was called, with a stamp to detect changes."""

    layer: nn.Module
    name: str
    tensor: torch.Tensor
    requires_grad: bool
    stamp: tuple | None

    @property
    def was_resharded(self) -> bool:
        """Whether an engine has replaced it by a shard since."""
        current = _tensor_of(self.layer, self.name)
        replaced = current is not None and type(current) is not DTensor
        return replaced and current.shape != self.tensor.shape

    @property
    def was_changed(self) -> bool:
        if self.tensor.is_meta:  # offloaded, so there are no values to compare
            return False
        current = _tensor_of(self.layer, self.name)
        if current is not self.tensor and type(current) is not DTensor and not self.was_resharded:
            return True
        return _differs(self.tensor, self.stamp)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The head call that the logits stand for."""

    head: nn.Module
    hidden: torch.Tensor
    device: torch.device  # of the head, which may differ from that of its input
    dtype: torch.dtype  # of the head's GEMMs
    fused: bool  # the loss is fused with the head; else it gets the plain logits
    scope: Scope
    with_grad: bool
    autocast: tuple[bool, torch.dtype]
    snapshots: tuple[Snapshot, ...] = dataclasses.field(repr=False)
    hidden_stamp: tuple | None
    consumers: list = dataclasses.field(default_factory=list)  # one entry per fused consumer
    seeds: list = dataclasses.field(default_factory=list)  # states of generators, see keep_dropout

    @contextlib.contextmanager
    def restored(self):
        """Restore the grad mode, autocast, weights and dropout of the call within the block."""
        enabled, dtype = self.autocast
        with (
            torch.set_grad_enabled(self.with_grad),
            torch.autocast(self.hidden.device.type, dtype=dtype, enabled=enabled),
            self.weights(),
            self._dropout(),
        ):
            yield

    def keep_dropout(self) -> None:
        """Make the dropout of an adapter on the head the same each time as in the next call."""
        if any(isinstance(m, nn.Dropout) and m.training and m.p for m in self.head.modules()):
            self.seeds.append(torch.get_rng_state())
            if self.device.type == "cuda":
                self.seeds.append(torch.cuda.get_rng_state(self.device))

    @contextlib.contextmanager
    def _dropout(self):
        if not self.seeds:
            yield
            return
        on_cpu, *on_device = self.seeds
        with torch.random.fork_rng([self.device] if on_device else []):
            torch.set_rng_state(on_cpu)
            for state in on_device:
                torch.cuda.set_rng_state(state, self.device)
            yield

    @contextlib.contextmanager
    def weights(self):
        """Put the weights of the call back within the block, if an engine has replaced them by
        shards since (FSDP1)."""
        resharded = [snapshot for snapshot in self.snapshots if snapshot.was_resharded]
        if not all(_in_memory(snapshot.tensor) for snapshot in resharded):
            raise RuntimeError(
                "The output head's weights were freed before its logits were used. Compute the "
                "loss in the model's forward, by giving it labels. " + WAY_OUT
            )
        shards = [(s.layer._parameters, s.name, s.layer._parameters[s.name]) for s in resharded]
        try:
            for snapshot in resharded:
                snapshot.layer._parameters[snapshot.name] = snapshot.tensor
            yield
        finally:
            for parameters, name, shard in shards:
                parameters[name] = shard

    def check(self) -> None:
        """Raise RuntimeError if the logits would differ from those at the time of the call.

        While the scope is open, nothing can have changed. Afterwards, version counters reveal
        in-place changes, and sampled elements reveal those that the counters miss (fused
        optimizers, writes to `.data`).
        """
        if self.scope.open:
            return
        tracked = self.with_grad and torch.is_grad_enabled()
        if tracked and any(s.tensor.requires_grad != s.requires_grad for s in self.snapshots):
            raise RuntimeError(
                "These logits were not computed during the forward, and weights of the output head "
                "have been frozen or unfrozen since. Read outputs.logits before that. " + WAY_OUT
            )
        hidden_differs = _differs(self.hidden, self.hidden_stamp)
        if hidden_differs or any(s.was_changed for s in self.snapshots):
            raise RuntimeError(
                "These logits were not computed during the forward, and the weights or hidden "
                "states that they are made of have changed since (an optimizer step?). Read "
                "outputs.logits before the change. " + WAY_OUT
            )

    def operands(self) -> list[torch.Tensor]:
        """Return the parameters that the logits' node in the autograd graph depends on.

        A search for unused parameters (DDP) must find them there. But a parameter's gradient is
        complete only when all of its nodes have run, which is too late for an engine whose hooks
        gather the head's weights just for its backward. Shards do not belong there either, because
        an engine replaces them by the whole parameter. Both are left out, unless nothing else
        requires a gradient.
        """
        layers = [self.head, *(snapshot.layer for snapshot in self.snapshots)]
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        tensors = [s.tensor for s in self.snapshots] or self.head.parameters()
        wanted = [p for p in tensors if p.requires_grad]
        in_memory = [p for p in wanted if p.numel() and not p.is_meta]
        whole = [p for p in in_memory if not isinstance(p, DTensor) and not hooked]
        return whole if whole or self.hidden.requires_grad else wanted


def snapshots_of(head: nn.Module) -> tuple[Snapshot, ...]:
    """Return snapshots of the head's weights, and of all parameters of an adapter on it."""
    found = []
    for layer in head.modules():
        names = list(layer._parameters)
        if isinstance(layer, nn.Linear):  # an engine may keep them as plain attributes
            names += [name for name in ("weight", "bias") if name not in names]
        for name in names:
            tensor = _tensor_of(layer, name)
            if tensor is not None:
                stamp = stamp_of(tensor)
                found.append(Snapshot(layer, name, tensor, tensor.requires_grad, stamp))
    return tuple(found)


def device_of(head: nn.Module, hidden: torch.Tensor) -> torch.device:
    """Return the device of `head(hidden)`: the weights may be on another device, or offloaded."""
    placed = next((t for t in head.parameters() if not t.is_meta), hidden).device
    hook = vars(head).get("_hf_hook")  # accelerate's, which moves input and weights
    target = getattr(hook, "execution_device", None)
    if target is None:
        return placed
    return torch.device(placed.type, target) if isinstance(target, int) else torch.device(target)


def _tensor_of(layer: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter of `layer`, not by attribute access, which gathers under ZeRO-3."""
    found = layer._parameters.get(name)
    return vars(layer).get(name) if found is None else found


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 4  # elements of each row and column


def stamp_of(tensor: torch.Tensor) -> tuple | None:
    """Return version, address and a few elements of each row and column.

    Return None for shards and offloaded tensors. Reading all elements would cost a pass over the
    head in every forward; and changes that no version counter records (fused optimizers, writes to
    `.data`) affect whole rows.
    """
    if not tensor.numel() or tensor.is_meta or isinstance(tensor, DTensor):
        return None
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    if bits.dim() < 2:
        return tensor._version, tensor.data_ptr(), (bits.clone(),)
    rows, columns = (max(1, n // _SAMPLES) for n in bits.shape[-2:])
    samples = bits[..., ::columns].clone(), bits[..., ::rows, :].clone()
    return tensor._version, tensor.data_ptr(), samples


def _differs(tensor: torch.Tensor, stamp: tuple | None) -> bool:
    if stamp is None or not _in_memory(tensor):
        return False
    (*before, samples), (*after, samples_now) = stamp, stamp_of(tensor)
    return before != after or not all(map(torch.equal, samples, samples_now))


def _in_memory(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().size() > 0
