"""What a rule answers about a module, and what it may know while it looks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import nn

from liger_trainer.config import KernelConfig
from liger_trainer.injection.probe import whole_shape
from liger_trainer.report import Row
from liger_trainer.swap import VALUES, Swapped, own_attributes

SWITCHED_OFF = "switched off in liger_kernel_config"
OVERRIDDEN = "its forward is replaced on the instance: inject before that"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A row for the report and, if it says swapped, the swap: the mixin for `module`'s class.

    `tells` is the row that the module amends while it runs, if that is another.
    """

    row: Row
    module: nn.Module | None = None
    mixin: type[Swapped] | None = None
    key: tuple = ()
    tells: Row | None = None


@dataclasses.dataclass
class Search:
    """One walk over a model."""

    model: nn.Module
    config: KernelConfig
    probes: dict[Hashable, object] = dataclasses.field(default_factory=dict)

    def device_of(self, module: nn.Module) -> torch.device:
        """Where to probe: where the module (else the model) lives; meta models on the CPU."""
        for owner in (module, self.model):
            for tensor in (*owner.parameters(), *owner.buffers()):
                if tensor.device.type != "meta":
                    return tensor.device
        return torch.device("cpu")

    def once(self, key: Hashable, probe: Callable[[], object]) -> object:
        """`probe()`, or its earlier result for the same key: equal instances are probed once."""
        if key not in self.probes:
            self.probes[key] = probe()
        return self.probes[key]


def fingerprint(module: nn.Module, device: torch.device) -> Hashable:
    """Equal for two instances of a class that differ in nothing but the values of parameters.

    An attribute that is not a plain value counts by identity, so instances that share it may match.
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
    """Tell the report of what has been added to an injected model since."""
    watch = vars(model).get("_liger_watch")
    if watch is not None and not torch.compiler.is_compiling():
        watch.look(model)
