"""Which kernels a run may use: `TrainingArguments.liger_kernel_config`, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

ACTIVATION_MEMORY = ("lean", "keep", "auto")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """One switch per kernel, all on by default.

    `fused_linear_cross_entropy` takes precedence over `cross_entropy`, which is for logits that are
    materialized anyway.

    `activation_memory`: "lean" recomputes in backward what one kernel can recompute, bit for bit,
    from tensors that are saved anyway (norm outputs, gated products, casts); "keep" saves them. A
    number is a budget in GiB for PyTorch's allocations on the device, and "auto" is the memory of
    the device: in addition to "lean", as few layers are checkpointed as the budget requires
    (`docs/lora.md`).
    """

    rms_norm: bool = True  # RMSNorm, with or without a gate
    layer_norm: bool = True  # LayerNorm
    rope: bool = True  # rotary embeddings
    attention: bool = True  # plain, packed and windowed rows attend without a mask
    swiglu: bool = True  # SiLU times a gate
    geglu: bool = True  # GELU times a gate
    cross_entropy: bool = True  # cross entropy of materialized logits
    fused_linear_cross_entropy: bool = True  # output head and loss as one operation, no logits
    lora: bool = True  # a linear layer and its adapters as one operation
    activation_memory: str | float = "lean"  # or "keep", or a budget: "auto" or GiB

    @property
    def has_budget(self) -> bool:
        """Whether `activation_memory` is a budget, by which layers are checkpointed."""
        return self.activation_memory not in ("lean", "keep")

    @classmethod
    def from_dict(
        cls, config: Mapping[str, bool | str | float] | KernelConfig | None
    ) -> KernelConfig:
        """Return the configuration of a mapping.

        Raises ValueError for an unknown key, suggesting the nearest one, and for an invalid value.
        """
        if isinstance(config, cls):
            return config
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in (config or {}).items():
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"liger_kernel_config has no key {key!r}; did you mean {near!r}? "
                    f"Known keys: {', '.join(names)}."
                )
            if key == "activation_memory":
                if value not in ACTIVATION_MEMORY and not _is_gib(value):
                    raise ValueError(
                        f"liger_kernel_config[{key!r}] must be one of "
                        f"{', '.join(map(repr, ACTIVATION_MEMORY))} or a positive number of GiB, "
                        f"got {value!r}"
                    )
            elif not isinstance(value, bool):
                raise ValueError(
                    f"liger_kernel_config[{key!r}] must be true or false, got {value!r}"
                )
        return cls(**(config or {}))

    def __str__(self) -> str:
        switches = dataclasses.asdict(self)
        memory = switches.pop("activation_memory")
        on = [name for name, value in switches.items() if value]
        off = [name for name, value in switches.items() if not value]
        return (
            f"on: {', '.join(on) or 'none'}; off: {', '.join(off) or 'none'}; "
            f"activation memory: {memory}"
        )


def _is_gib(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < float("inf")
