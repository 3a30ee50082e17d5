"""What a forward leaves behind for backward: the bytes of the storages that are still alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Collects every storage that an operation inside the block returns, weakly referenced."""

    def __init__(self):
        super().__init__()
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                self.made.append(weakref.ref(leaf.untyped_storage()))
        return out


def kept_bytes(forward: Callable[[], torch.Tensor], *known: torch.Tensor) -> int:
    """Return the bytes that `forward()` leaves alive, except its result and `known`."""
    mode = _Storages()
    with mode:
        loss = forward()
    gc.collect()
    alive = {s.data_ptr(): s.nbytes() for s in (ref() for ref in mode.made) if s is not None}
    for tensor in (loss, *known):
        alive.pop(tensor.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(alive.values())


def kept_bytes_per_token_and_layer(
    build: Callable[[int], torch.nn.Module], inputs: dict[str, torch.Tensor], layers=(1, 3)
) -> float:
    """Return the bytes kept per token and layer of `build(number of layers)`, as a difference."""
    found = []
    for number in layers:
        model = build(number)
        known = [*model.parameters(), *model.buffers(), *inputs.values()]
        found.append(kept_bytes(lambda model=model: model(**inputs).loss, *known))
    return (found[1] - found[0]) / (layers[1] - layers[0]) / inputs["input_ids"].numel()
