"""Heads that are split by rows over ranks (tensor parallelism).

Tensor parallelism wraps a linear layer: the input becomes a DTensor replicated on every rank, the
weight is a DTensor split by rows, and the output is gathered. Inside the wrapper, where the linear
function itself runs, both are visible, and a consumer can replace it with its work on the local
rows. What the wrapper does to the gradient of the input (a sum over the ranks), it does for the
consumer too.

A weight that is sharded over data-parallel ranks is a different case: there the input is a plain
tensor, and the weight is gathered beforehand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.overrides import TorchFunctionMode

from liger_trainer.kernels.linear.head import LinearHead
from liger_trainer.kernels.linear.vocab_parallel import VocabShard


def shard_of(weight: torch.Tensor | None) -> VocabShard | None:
    """Return which rows of `weight` [V, H] this rank holds; None if it is not evenly split by
    rows."""
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return None
    return _shard_along(weight.device_mesh, weight)


def _shard_along(mesh: DeviceMesh, weight: DTensor) -> VocabShard | None:
    try:
        return VocabShard.even(mesh.get_group(), weight.shape[0])
    except ValueError:  # some rank has no rows
        return None


def is_wrapped_shard(layer: nn.Module) -> bool:
    """Return whether the layer's weight is split and its forward is wrapped on the instance."""
    return "forward" in vars(layer) and isinstance(layer._parameters.get("weight"), DTensor)


def refuse_scattered(weight: torch.Tensor | None) -> None:
    """Raise RuntimeError if `weight` is also split over data-parallel ranks and not gathered."""
    dimensions = getattr(weight, "placements", ())
    if sum(not placement.is_replicate() for placement in dimensions) > 1:
        raise RuntimeError(
            "The output head's weight lies in shards of several kinds here: its logits are "
            "consumed after the forward of the module that holds it. Keep the weights of that "
            "module after its forward (reshard_after_forward=False for the root), or compute the "
            "loss in the model's forward, by giving it labels."
        )


class LocalRows(NamedTuple):
    """One call of a linear layer that is split by rows, on this rank."""

    head: LinearHead
    mesh: DeviceMesh

    @classmethod
    def of(cls, x, weight, bias, split: torch.Tensor | None) -> LocalRows | None:
        """Return the local rows of a call, or None if the layer is not split by rows.

        Also return None if nothing would sum the gradient of the input over the ranks. `split` is
        the weight at entry to the layer's forward, which a wrapper may have replaced by its local
        rows since. Raise RuntimeError if the weight is also split over data-parallel ranks.
        """
        refuse_scattered(split)
        shard = shard_of(split)
        if shard is None:
            return None
        mesh = split.device_mesh
        if isinstance(x, DTensor):
            if weight is not split or x.device_mesh != mesh or x.placements != (Replicate(),):
                return None
            x = x.to_local(grad_placements=[Partial()])
        elif torch.is_grad_enabled() and x.requires_grad:
            return None
        weight, bias = (t.to_local() if isinstance(t, DTensor) else t for t in (weight, bias))
        if weight.shape[0] != shard.rows:
            return None
        return cls(LinearHead([x], [weight], bias, shard), mesh)

    def leaving(self, tensor: torch.Tensor) -> DTensor:
        """Return `tensor`, equal on all ranks, as the DTensor that the wrapper passes through."""
        return DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)


Replacement = Callable[
    [torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], object
]


class _InPlaceOfLinear(TorchFunctionMode):
    """Replace the layer's `F.linear` by `take(x, weight, bias, split)`.

    If that returns NotImplemented, `F.linear` runs.
    """

    def __init__(self, layer: nn.Linear, take: Replacement):
        super().__init__()
        self._layer, self._take, self._split = layer, take, layer._parameters.get("weight")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = NotImplemented
        if func is F.linear and len(args) == 3 and not kwargs:
            is_own = args[1] is self._layer._parameters.get("weight")
            found = self._take(*args, self._split) if is_own else found
        return func(*args, **kwargs) if found is NotImplemented else found


@contextlib.contextmanager
def in_place_of_linear(layer: nn.Linear, take: Replacement) -> Iterator[None]:
    """Replace `F.linear` by `take` in calls of a layer whose forward is wrapped on the instance."""
    own = vars(layer)["forward"]

    def forward(*args, **kwargs):
        with _InPlaceOfLinear(layer, take):
            return own(*args, **kwargs)

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        vars(layer)["forward"] = own


def is_transparent(layer: nn.Module) -> bool:
    """Return whether the wrapper of a split layer's forward passes input and result unchanged.

    This is tested once for each wrapper and split of the weight, with a few numbers that do not
    reach the weight, and without the module's hooks. No rank waits for another.
    """
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or not is_wrapped_shard(layer):
        return False
    key = vars(layer)["forward"], weight.placements, weight.device_mesh
    tested, found = vars(layer).get("_liger_transparent", (None, False))
    if tested != key:
        found = _passes_unchanged(layer, weight)
        layer._liger_transparent = key, found
    return found


def _passes_unchanged(layer: nn.Linear, weight: torch.Tensor) -> bool:
    hidden = torch.rand(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    marks = torch.rand(3, dtype=weight.dtype, device=weight.device)
    seen, mesh = [], None

    def take(x, *_):
        nonlocal mesh
        if isinstance(x, DTensor) and x.placements == (Replicate(),):
            mesh = x.device_mesh
            x = x.to_local()
        seen.append(x)
        split = mesh is not None and _is_split_by_rows(weight, mesh)
        return DTensor.from_local(marks, mesh, [Replicate()], run_check=False) if split else marks

    for with_grad in (True, False):  # without gradients, a wrapper may use local tensors
        with in_place_of_linear(layer, take), torch.set_grad_enabled(with_grad):
            try:
                returned = layer.forward(hidden.requires_grad_(with_grad))
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return False
        if len(seen) != 1 or not (_are_same(seen.pop(), hidden) and _are_same(returned, marks)):
            return False
    split = mesh is not None and _is_split_by_rows(weight, mesh)
    return split and _shard_along(mesh, weight) is not None


def _is_split_by_rows(weight: DTensor, mesh: DeviceMesh) -> bool:
    """Return whether `weight` is split by rows along `mesh`.

    The weight's own mesh may have further dimensions (data-parallel ranks).
    """
    own = weight.device_mesh
    if own == mesh:
        return weight.placements == (Shard(0),)
    names, (name, *more) = own.mesh_dim_names or (), mesh.mesh_dim_names or (None,)
    return not more and name in names and weight.placements[names.index(name)].is_shard(0)


def _are_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        type(a) is torch.Tensor
        and a.shape == b.shape
        and a.dtype == b.dtype
        and (a.is_meta or torch.equal(a, b))
    )
