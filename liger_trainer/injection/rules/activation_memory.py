"""What the model's forward saves for backward: `liger_kernel_config.activation_memory`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn

from liger_trainer.injection import memory_budget
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap, look_again
from liger_trainer.kernels.recompute import recomputing
from liger_trainer.kernels.runtime import is_looked_into, pays
from liger_trainer.swap import Swapped, while_current

logger = logging.getLogger(__name__)

RULE = "activation_memory"
# Elements of the hidden states. With fewer, a step may wait for the host, which spends 1 us or more
# in the hooks for each tensor that autograd saves.
MIN_ELEMENTS = 1 << 24
_WIDTH = 4096  # of the hidden states of a model whose configuration does not tell


class LeanModel(Swapped):
    """A model whose forward runs within `kernels.recompute.recomputing`; key: its width.

    In compiled code, the compiler decides what to recompute.
    """

    @classmethod
    def namespace(cls, base: type, width: int) -> dict[str, object]:
        return {"forward": while_current(base, _lean(base.forward, width))}


class BudgetedModel(Swapped):
    """A model that checkpoints as many layers as a memory budget requires; key: the budget."""

    @classmethod
    def namespace(cls, base: type, requested: str | float) -> dict[str, object]:
        return {"forward": while_current(base, _budgeted(base.forward, requested))}


def _lean(original: Callable, width: int) -> Callable:
    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if is_looked_into() or not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        look_again(self)
        tokens = _first_input(args, kwargs)
        if tokens is None or not pays(tokens, MIN_ELEMENTS // width):
            return original(self, *args, **kwargs)
        with recomputing():
            return original(self, *args, **kwargs)

    return forward


def _budgeted(original: Callable, requested: str | float) -> Callable:
    takes_cache = "use_cache" in inspect.signature(original).parameters

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        tokens = _first_input(args, kwargs)
        trains = torch.is_grad_enabled() and self.training
        if is_looked_into() or not trains or tokens is None or not tokens.numel():
            return original(self, *args, **kwargs)
        budget = _budget(self, requested)
        if budget is None:
            return original(self, *args, **kwargs)
        if takes_cache:  # a checkpointed layer cannot fill a cache
            kwargs.setdefault("use_cache", False)
        run = functools.partial(original, self, *args, **kwargs)
        return memory_budget.within_budget(budget, self, tokens.numel(), run)

    return forward


def _budget(model: nn.Module, requested: str | float) -> memory_budget.Budget | None:
    """Return the budget of `model`; on a device without memory statistics, warn and return None."""
    found = vars(model).get("_liger_budget", False)
    device = next(model.parameters()).device
    if found is None or (found and found.device.device == device):
        return found
    layers, memory = memory_budget.layers_of(model), memory_budget.Device(device)
    if (reason := memory_budget.why_not(model)) is not None:
        budget = memory_budget.EveryLayer(requested, layers, memory, reason=reason)
        logger.warning("activation_memory: %s", budget)
    elif device.type == "cuda":
        budget = memory_budget.Budget(requested, layers, memory)
    else:
        logger.warning("activation_memory: no budget on %s, which tells nothing of memory", device)
        budget = None
    model._liger_budget = budget
    return budget


def _first_input(args: tuple, kwargs: dict[str, object]) -> torch.Tensor | None:
    """Return one number for each token: ids [B, T], or a part of the embeddings [B, T, H]."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
    first = next((t for t in candidates if torch.is_tensor(t) and t.dim() >= 2), None)
    return first if first is None or first.dim() == 2 else first[..., 0]


def propose_for_model(search: Search, fused: set[str]) -> Iterator[Proposal]:
    """Propose recomputation if the rules in `fused` swap norms or gated activations, and a memory
    budget if one is requested."""
    mode = search.config.activation_memory
    if mode == "keep":
        yield Proposal.off("", RULE)
        return
    reasons, swaps = [], []
    if search.config.has_budget:
        budget = "auto" if mode == "auto" else f"{mode} GiB"
        if memory_budget.layers_of(search.model):
            reason = memory_budget.why_not(search.model)
            what = f"as few layers are checkpointed as fit ({budget})"
            reasons.append(f"every layer is checkpointed: {reason}" if reason else what)
            swaps.append(Swap(search.model, BudgetedModel, (mode,)))
        else:
            reason = f"no budget ({budget}): the model's layers cannot be checkpointed"
            yield Proposal.refused("", RULE, reason)
    if fused & {"rms_norm", "layer_norm", "swiglu", "geglu"}:
        reasons.append("norm outputs and gated products are computed again in backward")
        swaps.append(Swap(search.model, LeanModel, (_width_of(search.model),)))
    if swaps:
        yield Proposal.swapped("", RULE, "; ".join(reasons), *swaps)


def _width_of(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    # Of an encoder and a decoder, transformers asks which is meant.
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else _WIDTH
