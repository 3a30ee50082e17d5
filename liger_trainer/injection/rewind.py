"""Run a forward again as if it had not run before: in place of one that failed, or in backward.

Running statistics, counters and the like, which a forward updates, would otherwise take in the same
batch twice; and random numbers would be others.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

logger = logging.getLogger(__name__)

# Elements of a buffer up to which it is copied. Larger ones are weights (quantized ones, say).
LARGEST_COPY = 1 << 20
_PLAIN = (int, float, bool, str, NoneType)


class _Buffer(NamedTuple):
    tensor: torch.Tensor | None
    copy: torch.Tensor | None  # of what it held; None for a large one
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> _Buffer:
        if tensor is None or tensor.is_meta or tensor.is_inference():
            return cls(tensor, None, 0)
        small = tensor.layout is torch.strided and tensor.numel() <= LARGEST_COPY
        return cls(tensor, tensor.detach().clone() if small else None, tensor._version)

    @property
    def is_lost(self) -> bool:
        """Whether it was changed and there is no copy."""
        if self.tensor is None or self.tensor.is_meta or self.tensor.is_inference():
            return False
        return self.copy is None and self.tensor._version != self.version


class ModuleState:
    """Buffers and plain attributes of a module and of those inside it, as they are now."""

    def __init__(self, module: nn.Module):
        self._modules = [
            (each, plain_attributes(each), {n: _Buffer.of(b) for n, b in each._buffers.items()})
            for each in module.modules()
            if _may_change(each)
        ]

    @property
    def lost(self) -> str | None:
        """Return the name of a large buffer that was changed since, which cannot be undone."""
        found = (
            f"{type(module).__name__}.{name}"
            for module, _, buffers in self._modules
            for name, buffer in buffers.items()
            if buffer.is_lost
        )
        return next(found, None)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was done to the modules since."""
        for module, attributes, buffers in self._modules:
            set_plain_attributes(module, attributes)
            module._buffers.clear()
            for name, (tensor, copy, _) in buffers.items():
                module._buffers[name] = tensor
                if copy is not None and not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it, the modules are as they were then; what is done to them is forgotten.

        Buffers are exchanged, not written to: autograd may have kept them.
        """
        now = [(m, dict(vars(m)), dict(m._buffers)) for m, _, _ in self._modules]
        try:
            for module, attributes, buffers in self._modules:
                set_plain_attributes(module, attributes)
                module._buffers.clear()
                module._buffers.update(
                    (n, b.tensor if b.copy is None else b.copy.clone()) for n, b in buffers.items()
                )
            yield
        finally:
            for module, attributes, tensors in now:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(tensors)


def _may_change(module: nn.Module) -> bool:
    """Return whether a call of `module` may change it: torch's own classes change only buffers.

    Most modules of a model with adapters are torch's, and there is a state in every step.
    """
    return bool(
        module._buffers
        or module._forward_hooks
        or module._forward_pre_hooks
        or not type(module).__module__.startswith("torch.nn.")
    )


def plain_attributes(owner: object) -> dict[str, object]:
    """Return the attributes that are numbers, text or None; ours are left out."""
    return {
        name: value
        for name, value in vars(owner).items()
        if type(value) in _PLAIN and not name.startswith("_liger_")
    }


def set_plain_attributes(owner: object, attributes: dict[str, object]) -> None:
    """Make `plain_attributes(owner)` what it was, and leave the other attributes alone."""
    for name in plain_attributes(owner).keys() - attributes.keys():
        del vars(owner)[name]
    vars(owner).update(attributes)


class RandomState:
    """The generators of torch, for the CPU and `device`, of NumPy and of Python, as they are."""

    def __init__(self, device: torch.device):
        self._device = device
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


class Before:
    """The state from which a forward that runs out of memory is repeated."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._modules, self._random = ModuleState(model), RandomState(device)

    def can_be_restored(self) -> bool:
        """Return whether it can be; there is a warning if it cannot."""
        lost = self._modules.lost
        if lost is not None:
            logger.warning("out of memory: not repeated, for the forward has changed %s", lost)
        return lost is None

    def restore(self) -> None:
        self._modules.restore()
        self._random.restore()


def checkpoint(layer: nn.Module, function: Callable, *args):
    """Return `function(*args)`, a call of `layer`; backward repeats it, which leaves no trace."""
    state = ModuleState(layer)
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), state.again()),
    )
