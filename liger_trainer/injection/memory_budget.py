"""Checkpoint as few layers as a memory budget requires: `activation_memory: auto`, or a number.

With L layers, of which the last k keep their activations and the others are checkpointed, a step
of n tokens takes

    base + rest * max(1, n / n_rest) + k * n * cost

where `base` is what is allocated before the forward (weights, optimizer states), `cost` the bytes
that one token costs in a layer that keeps its activations, beyond one that is checkpointed, and
`rest` everything else at the peak (gradients, the head's workspace, one recomputed layer),
seen in a step of n_rest tokens.

The first step measures: it keeps one layer. From the second on, k is the largest number that fits.
A forward that runs out of memory is repeated with fewer layers, from the same random state, buffers
and counters; so is a whole step, by a trainer, in one process before gradients have accumulated.
Either gives the same result as without the failure. The first layers are the ones that are
checkpointed: backward reaches them when the activations of the others are already freed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from liger_trainer.injection.rewind import (
    Before,
    checkpoint,
    plain_attributes,
    set_plain_attributes,
)
from liger_trainer.request import config_of

logger = logging.getLogger(__name__)

GIB = 1 << 30
# Of the device: blocks that the allocator cannot use, and what others allocate.
_USABLE = 0.94
_LOWER = 0.95  # of what was allocated when memory ran out


class Device(NamedTuple):
    """The memory of one device, in bytes, as this process sees it."""

    device: torch.device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Return the most that was ever allocated; nobody's statistics are reset."""
        return torch.cuda.max_memory_allocated(self.device)

    def usable(self) -> int:
        """Return what this process could have allocated at once."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(_USABLE * (free + torch.cuda.memory_reserved(self.device)))

    def release(self) -> None:
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Budget:
    """What was measured, and the choice that follows; sizes in bytes.

    `asked` is "auto" or a number of GiB that PyTorch may allocate on the device.
    """

    asked: str | float
    layers: list[nn.Module] = dataclasses.field(repr=False)
    device: Device
    limit: int = 0
    cost: float = 0.0
    rest: int | None = None
    rest_tokens: int = 0
    kept: int = 1  # in the step that runs
    base: int = 0
    tokens: int = 0
    peak_before: int = 0
    steps: int = 0
    told: int | None = None
    lowered: int = 0
    too_many: int = 0  # tokens with which even one layer was too much, before it was measured

    def choose(self, tokens: int) -> int:
        """Return how many layers keep their activations in the step of `tokens` that begins."""
        self._learn()
        if not self.limit:
            self.limit = self.device.usable() if self.asked == "auto" else int(self.asked * GIB)
        self.base, self.tokens, self.steps = self.device.allocated(), tokens, self.steps + 1
        self.peak_before = self.device.peak()
        self.kept = self._fit()
        self._tell()
        return self.kept

    def _fit(self) -> int:
        """Return how many layers may keep their activations in this step.

        Before it is known, one; none for as many tokens as that was too much for.
        """
        if self.rest is None:
            return int(not self.too_many or self.tokens < self.too_many)
        free = self.limit - self.base - self._rest_for(self.tokens)
        return max(0, min(len(self.layers), int(free / (self.cost * self.tokens))))

    def _learn(self) -> None:
        """Take in what the last step took at its peak, or at most took if the peak is older."""
        if not (self.steps and self.cost):
            return
        peak = self.device.peak()
        rest = peak - self.base - int(self.kept * self.cost * self.tokens)
        if self.rest is not None:
            expected = self._rest_for(self.tokens)
            is_tighter = rest < expected and self.tokens >= self.rest_tokens
            is_more = rest > expected and peak > self.peak_before
            if not (is_tighter or is_more):
                return
        self.rest, self.rest_tokens = max(rest, 0), self.tokens

    def _rest_for(self, tokens: int) -> int:
        return int(self.rest * max(1.0, tokens / self.rest_tokens))

    def check(self, is_first: bool) -> None:
        """Raise ValueError after a first forward that takes more than was asked for in any case."""
        taken = self.device.allocated()
        if is_first and self.kept == 0 and self.asked != "auto" and taken > self.limit:
            raise ValueError(
                f"activation_memory: {self.asked} GiB is less than a step takes: with every layer "
                f"checkpointed, a forward of {self.tokens} tokens leaves {taken / GIB:.1f} GiB in "
                "use. Give more, or reduce or shorten the batch."
            )

    def lower(self) -> int:
        """Return how many layers to keep in place of `kept`, with which memory ran out."""
        self.device.release()
        self.limit = int(_LOWER * min(self.limit, self.device.peak()))
        self.lowered += 1
        if self.rest is None:
            self.too_many = min(self.too_many or self.tokens, self.tokens)
        self.kept = self.told = max(0, min(self._fit(), self.kept - 1))
        self.peak_before = self.device.peak()  # which tells nothing of the step as it is repeated
        logger.warning(
            "out of memory: the step is repeated with %d of %d layers checkpointed",
            len(self.layers) - self.kept,
            len(self.layers),
        )
        return self.kept

    def _tell(self) -> None:
        if self.rest is not None and self.kept != self.told:
            self.told = self.kept
            logger.info("activation_memory: %s", self)

    def __str__(self) -> str:
        if self.told is None:
            return f"{self.asked}: not measured yet"
        asked = (
            f"auto ({self.limit / GIB:.1f} GiB)" if self.asked == "auto" else f"{self.asked} GiB"
        )
        lowered = f"; lowered {self.lowered} times after running out" if self.lowered else ""
        return (
            f"{asked}: {len(self.layers) - self.told} of {len(self.layers)} layers checkpointed; "
            f"one that is not takes {self.cost * self.tokens / GIB:.2f} GiB more for {self.tokens} "
            f"tokens{lowered}"
        )


@dataclasses.dataclass
class EveryLayer(Budget):
    """In place of a budget that cannot be kept for `reason`: every layer is checkpointed."""

    reason: str = ""

    def choose(self, tokens: int) -> int:
        self.kept = self.told = 0
        return 0

    def check(self, is_first: bool) -> None:
        """Accept whatever a forward takes."""

    def __str__(self) -> str:
        return f"every layer is checkpointed: {self.reason}"


def budget_of(model: nn.Module) -> Budget | None:
    """Return the budget of an injected model, or of the one inside a wrapper; None before a step
    was trained, and where there is none."""
    found = (vars(module).get("_liger_budget") for module in model.modules())
    return next((budget for budget in found if budget is not None), None)


def why_not(model: nn.Module) -> str | None:
    """Return None if a budget can be kept for `model`, else the reason."""
    parameters = list(model.parameters())
    if any(isinstance(p, DTensor) or not p.numel() for p in parameters):
        return "its weights are sharded, and every process would choose for itself"
    if len({p.device for p in parameters}) != 1:
        return "its weights lie on several devices"
    return None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that can be checkpointed, outermost ones alone, in order."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(m) for m in module.modules())
    return found


def within_budget(budget: Budget, model: nn.Module, tokens: int, forward: Callable):
    """Return `forward()` of `model`, with as many layers checkpointed as the budget demands.

    Raises torch.OutOfMemoryError if all are and that is not enough, and ValueError if it is more
    than the number of GiB that was asked for.
    """
    is_first = budget.told is None
    kept = budget.choose(tokens)
    before = None if kept == 0 else Before(model, budget.device.device)
    while True:
        try:
            with _checkpointed(budget.layers, len(budget.layers) - kept), _measured(budget):
                found = forward()
                budget.check(is_first)
                return found
        except torch.OutOfMemoryError:
            if before is None or not before.can_be_restored():
                raise
        # Out of the handler: its traceback holds the activations.
        kept = budget.lower()
        before.restore()
        before = before if kept else None


@contextlib.contextmanager
def _checkpointed(layers: list[nn.Module], count: int) -> Iterator[None]:
    """Within it, the first `count` layers are checkpointed and no other is."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{n: vars(layer)[n] for n in names if n in vars(layer)} for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index < count
            layer._gradient_checkpointing_func = functools.partial(checkpoint, layer)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(values)


@contextlib.contextmanager
def _measured(budget: Budget) -> Iterator[None]:
    """Within it, the last layer tells what it keeps; in the first step alone."""
    if budget.cost or budget.kept != 1:
        yield
        return
    at_start: list[int] = []
    layer = budget.layers[-1]

    def start(module, args):
        at_start.append(budget.device.allocated())

    def end(module, args, output):
        kept = budget.device.allocated() - at_start[0]
        hidden = output[0] if isinstance(output, tuple) else output
        # What a checkpointed layer keeps: its input, which is the output of the one before.
        budget.cost = max(kept - hidden.numel() * hidden.element_size(), 1) / budget.tokens

    handles = [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repeated(trainer: Trainer, model: nn.Module, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return `step()`, a forward and backward; once more if it runs out of memory and can be.

    It can in one process, where no gradients had accumulated before.
    """
    config = config_of(trainer)
    if config is None or not config.has_budget:
        return step()
    if trainer.args.world_size > 1 or any(p.grad is not None for p in model.parameters()):
        return step()
    if isinstance(budget_of(model), EveryLayer):
        return step()
    before = Before(model, next(model.parameters()).device)
    attributes = plain_attributes(trainer)
    # What TRL's trainers add up for the next line of their log.
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))
    while True:
        try:
            return step()
        except torch.OutOfMemoryError:
            budget = budget_of(model)
            if budget is None or budget.kept == 0 or not before.can_be_restored():
                raise
        model.zero_grad(set_to_none=True)
        budget.lower()
        before.restore()
        set_plain_attributes(trainer, attributes)
        if metrics is not None:
            trainer._metrics = copy.deepcopy(metrics)
