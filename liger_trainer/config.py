"""Which kernels a run may use: `TrainingArguments.liger_kernel_config`, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

ACTIVATION_MEMORY = ("lean", "keep")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """One switch per kernel, all on. `fused_linear_cross_entropy` takes precedence over
    `cross_entropy`, which serves logits that exist anyway.

    `activation_memory`: "lean" computes again in backward what one kernel gives back from tensors
    that are kept anyway (norm outputs, gated products, casts), to the same bits; "keep" keeps it.
    """

    rms_norm: bool = True  # RMSNorm, with or without a gate
    layer_norm: bool = True  # LayerNorm
    rope: bool = True  # rotary embeddings
    attention: bool = True  # plain, packed and windowed rows attend without a mask
    swiglu: bool = True  # SiLU times a gate
    geglu: bool = True  # GELU times a gate
    cross_entropy: bool = True  # the loss of logits that exist
    fused_linear_cross_entropy: bool = True  # output head and loss in one, without logits
    lora: bool = True  # a linear layer and its adapters in one
    activation_memory: str = "lean"  # recompute cheap outputs in backward; or "keep" them

    @classmethod
    def from_dict(cls, config: Mapping[str, bool | str] | KernelConfig | None) -> KernelConfig:
        """Raises ValueError for an unknown key (naming the nearest) and a value it cannot have."""
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
                if value not in ACTIVATION_MEMORY:
                    raise ValueError(
                        f"liger_kernel_config[{key!r}] must be one of "
                        f"{', '.join(map(repr, ACTIVATION_MEMORY))}, got {value!r}"
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
