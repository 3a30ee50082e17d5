"""What the model's forward leaves behind for backward: `liger_kernel_config.activation_memory`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from liger_trainer.injection.rules.finding import SWITCHED_OFF, Finding, Search, look_again
from liger_trainer.kernels.recompute import recomputing
from liger_trainer.kernels.runtime import pays
from liger_trainer.report import Row
from liger_trainer.swap import Swapped

RULE = "activation_memory"
# Below, the hooks (1 us for every tensor that autograd saves) cost more than the memory is worth.
MIN_TOKENS = 4096


class LeanModel(Swapped):
    """A model whose forward runs within `kernels.recompute.recomputing`.

    Compiled code decides for itself what to keep.
    """

    @classmethod
    def namespace(cls, base: type) -> dict[str, object]:
        return {"forward": _lean(base.forward)}


def _lean(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        look_again(self)
        if not _is_long(args, kwargs):
            return original(self, *args, **kwargs)
        with recomputing():
            return original(self, *args, **kwargs)

    return forward


def _is_long(args: tuple, kwargs: dict[str, object]) -> bool:
    """Whether the first input, token ids [B, T] or embeddings [B, T, H], has tokens enough."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
    first = next((t for t in candidates if torch.is_tensor(t) and t.dim() >= 2), None)
    return first is not None and pays(first[..., 0] if first.dim() > 2 else first, MIN_TOKENS)


def examine_model(search: Search, rules: set[str]) -> Iterator[Finding]:
    """The model, if norms or gated activations (in `rules`, what was swapped) are swapped in it."""
    if not rules & {"rms_norm", "layer_norm", "swiglu", "geglu"}:
        return
    if search.config.activation_memory == "keep":
        yield Finding(Row("", RULE, False, SWITCHED_OFF, eligible=False))
        return
    reason = "norm outputs and gated products are computed again in backward"
    yield Finding(Row("", RULE, True, reason), search.model, LeanModel)
