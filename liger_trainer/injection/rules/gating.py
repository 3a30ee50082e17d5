"""Whether a module multiplies what its activation returns, as a gated MLP does."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from liger_trainer.deferred import Deferred
from liger_trainer.injection import probe
from liger_trainer.swap import Swapped, swap

PRODUCTS = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply,
             torch.Tensor.__mul__, torch.Tensor.__rmul__)  # fmt: skip
"""What multiplies two tensors element by element."""


def is_gated(module: nn.Module, name: str) -> bool | None:
    """Return whether `module` multiplies the output of its activation `name`; None if unknown.

    A copy of the module is run on the meta device, where nothing is computed. Further inputs that
    it requires get the same tensor, or None (a residual, a mask). Some modules cannot be run like
    that (experts and their routing); some of these have an attribute that states it (`has_gate`).
    An unknown result is safe: the swap is correct either way, and if no multiplication follows at
    run time, deferral is switched off.
    """
    if hasattr(module, "has_gate"):
        return bool(module.has_gate)
    try:
        twin = probe.meta_copy(module)
    except Exception:  # a module may hold objects that cannot be copied
        return None
    activation = getattr(twin, name)
    swap(activation, _Recorder)
    tensors = sorted((*twin.parameters(), *twin.buffers()), key=torch.Tensor.dim, reverse=True)
    widths = dict.fromkeys(n for t in tensors if t.dim() <= 2 for n in reversed(t.shape))
    others = _number_of_inputs(twin) - 1
    for width, given in itertools.product(widths, (True, False)[: 1 + (others > 0)]):
        activation.read = activation.multiplied = activation.broadcast = False
        x = torch.empty(4, 4, width, device="meta", dtype=tensors[0].dtype)
        try:
            with torch.no_grad():
                twin(x, *[x if given else None] * others)
        except Exception:  # the wrong width, or a forward that cannot run on the meta device
            continue
        if activation.multiplied or not others:
            return activation.multiplied
        # Other inputs than it gets from a model may have made other shapes.
        if activation.read and not activation.broadcast:
            return False
    return None


def _number_of_inputs(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


class _Recorder(Swapped):
    """A stand-in for the activation on the meta device, which records how its result is used."""

    def forward(self, x):
        deferred = _Recorded(x.shape, x.dtype, x.device)
        deferred._gate, deferred._owner = x, self
        return deferred


class _Recorded(Deferred):
    handlers: ClassVar[dict[Callable, Callable]] = {}

    def compute(self):
        self._owner.read = True
        return torch.empty_like(self._gate)


def _record_product(a, b, **kwargs):
    recorded, other = (a, b) if isinstance(a, _Recorded) else (b, a)
    if torch.is_tensor(other):
        recorded._owner.multiplied |= other.shape == recorded.shape
        recorded._owner.broadcast |= other.shape != recorded.shape
    return torch.empty_like(recorded._gate) * other


_Recorded.handlers |= dict.fromkeys(PRODUCTS, _record_product)
