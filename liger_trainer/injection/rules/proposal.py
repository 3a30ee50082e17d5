"""The swaps that a rule proposes for a module, and the context of the search."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn

from liger_trainer.config import KernelConfig
from liger_trainer.injection.probe import whole_shape
from liger_trainer.report import Row, Status
from liger_trainer.swap import VALUES, Swapped, own_attributes

OVERRIDDEN = "its forward is replaced on the instance: inject before that"


class Swap(NamedTuple):
    """The module to swap, the mixin for its class, and the mixin's key."""

    module: nn.Module
    mixin: type[Swapped]
    key: tuple = ()


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A row for the report, and the swaps to make if its status is SWAPPED.

    The swapped modules may amend the row at run time.
    """

    row: Row
    swaps: tuple[Swap, ...] = ()

    @classmethod
    def swapped(
        cls, site: str, rule: str, reason: str, *swaps: Swap, max_error: float | None = None
    ) -> Proposal:
        return cls(Row(site, rule, Status.SWAPPED, reason, max_error), swaps)

    @classmethod
    def refused(cls, site: str, rule: str, reason: str, max_error: float | None = None) -> Proposal:
        return cls(Row(site, rule, Status.REFUSED, reason, max_error))

    @classmethod
    def not_applicable(cls, site: str, rule: str, reason: str) -> Proposal:
        return cls(Row(site, rule, Status.NOT_APPLICABLE, reason))

    @classmethod
    def off(cls, site: str, rule: str, max_error: float | None = None) -> Proposal:
        reason = "switched off in liger_kernel_config"
        return cls(Row(site, rule, Status.OFF, reason, max_error))


@dataclasses.dataclass
class Search:
    """One walk over a model."""

    model: nn.Module
    config: KernelConfig
    probes: dict[Hashable, object] = dataclasses.field(default_factory=dict)

    def device_of(self, module: nn.Module) -> torch.device:
        """Return the device of the module, or of the model, to probe on; the CPU if on meta."""
        for owner in (module, self.model):
            for tensor in (*owner.parameters(), *owner.buffers()):
                if tensor.device.type != "meta":
                    return tensor.device
        return torch.device("cpu")

    @functools.cached_property
    def output_embeddings(self) -> nn.Module | None:
        return getattr(self.model, "get_output_embeddings", lambda: None)()

    def cached(self, key: Hashable, probe: Callable[[], Any]) -> Any:
        """Return `probe()`, computed once per key."""
        if key not in self.probes:
            self.probes[key] = probe()
        return self.probes[key]


def fingerprint(module: nn.Module, device: torch.device) -> Hashable:
    """Return a key that is equal for instances of a class that differ only in parameter values.

    An attribute that is not a plain value is compared by identity.
    """
    attributes = tuple(
        (name, value if isinstance(value, VALUES) else id(value))
        for name, value in own_attributes(module)
    )
    tensors = tuple(
        (name, whole_shape(t), t.dtype)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    )
    children = tuple((name, type(child)) for name, child in module.named_modules())
    return children, repr(attributes), tensors, str(device)


def look_again(model: nn.Module) -> None:
    """Add modules that joined an injected model later to its report."""
    watch = vars(model).get("_liger_watch")
    if watch is not None and not torch.compiler.is_compiling():
        watch.look(model)
