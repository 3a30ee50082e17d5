"""accelerate's own preparation of a model for several devices, on CPU processes.

accelerate offers FSDP, context and sequence parallelism on accelerators only. `over_gloo` makes it
take that way for the CPU; everything behind it is accelerate's own code.
"""

from __future__ import annotations

import os

import torch
from torch import nn


def over_gloo() -> None:
    """Make accelerate treat the CPU as several devices that communicate through gloo."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


def forget() -> None:
    """Make accelerate forget the engine before, which its objects of one process share."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator(precision: str = "no", **plugin):
    """Return a new Accelerator with FSDP2; `plugin` holds options of its plugin."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    over_gloo()
    forget()
    options = {"cpu_ram_efficient_loading": False, **plugin}
    fsdp = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    return Accelerator(mixed_precision=precision, fsdp_plugin=fsdp)


def fsdp2(precision: str = "no", **plugin):
    """Wrap a model with accelerate, for a row of the engine matrix."""

    def prepare(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # accelerate wants both
        return accelerator(precision, **plugin).prepare(model, optimizer)[0]

    return prepare
