"""Checkpoint as few layers as a memory budget requires: `activation_memory: auto`, or a number.

If the last k layers keep their activations and all others are checkpointed, a step of n tokens
takes

    base + rest * max(1, n / n_rest) + k * n * cost

bytes, where `base` is allocated before the forward (weights, optimizer states), `cost` is what a
layer that keeps its activations takes per token, beyond a checkpointed one, and `rest` is
everything else at the peak (gradients, the head's workspace, one recomputed layer), measured in a
step of n_rest tokens.

The first step measures: it keeps one layer. In all later steps, k is the largest number that fits.
A forward that runs out of memory is repeated with fewer layers, from the same random state, buffers
and counters. In the same way, a trainer repeats a whole step, if there is one process and no
gradients had accumulated. The result is the same as without the failure. The first layers are the
ones that are checkpointed: backward reaches them when the activations of the others are already
freed.
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
from accelerate.state import AcceleratorState, is_initialized
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
# The share of the device's memory that is used: the allocator cannot use some blocks, and other
# libraries allocate, too.
_USABLE = 0.97
_LOWER = 0.95  # the new limit, relative to what was allocated when memory ran out


class Device(NamedTuple):
    """The memory of one device, in bytes, as this process sees it."""

    device: torch.device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Return the maximum that was ever allocated; does not reset the statistics."""
        return torch.cuda.max_memory_allocated(self.device)

    def usable(self) -> int:
        """Return how much this process can and may allocate in all."""
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        return int(_USABLE * min(allowed, free + torch.cuda.memory_reserved(self.device)))

    def release(self) -> None:
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Budget:
    """The measurements, and how many layers keep their activations; sizes in bytes.

    `requested` is "auto" or a number of GiB that PyTorch may allocate on the device.
    """

    requested: str | float
    layers: list[nn.Module] = dataclasses.field(repr=False)
    device: Device
    limit: int = 0
    cost: float = 0.0
    rest: int | None = None
    rest_tokens: int = 0
    kept: int = 1  # layers that keep their activations in the current step
    base: int = 0
    tokens: int = 0
    peak_before: int = 0
    steps: int = 0
    reported: int | None = None  # the last `kept` that was logged
    lowered: int = 0
    too_many: int = 0  # tokens with which one kept layer ran out of memory, before measurement

    def choose(self, tokens: int) -> int:
        """Begin a step of `tokens`, and return how many layers keep their activations in it."""
        self._learn()
        if not self.limit:
            is_auto = self.requested == "auto"
            self.limit = self.device.usable() if is_auto else int(self.requested * GIB)
        self.base, self.tokens, self.steps = self.device.allocated(), tokens, self.steps + 1
        self.peak_before = self.device.peak()
        self.kept = self._fit()
        self._report()
        return self.kept

    def _fit(self) -> int:
        """Return how many layers may keep their activations in this step.

        Before the measurement that is one, or none if one ran out of memory with so many tokens.
        """
        if self.rest is None:
            return int(not self.too_many or self.tokens < self.too_many)
        free = self.limit - self.base - self._rest_for(self.tokens)
        return max(0, min(len(self.layers), int(free / (self.cost * self.tokens))))

    def _learn(self) -> None:
        """Update `rest` from the peak of the last step, an upper bound if the peak is older."""
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
        """Raise ValueError if the first forward exceeds the budget with all layers checkpointed."""
        taken = self.device.allocated()
        if is_first and self.kept == 0 and self.requested != "auto" and taken > self.limit:
            raise ValueError(
                f"activation_memory: {self.requested} GiB is less than a step takes: with every "
                f"layer checkpointed, a forward of {self.tokens} tokens leaves {taken / GIB:.1f} "
                "GiB in use. Give more, or reduce or shorten the batch."
            )

    def lower(self) -> int:
        """Lower the limit after running out of memory, and return how many layers to keep."""
        self.device.release()
        self.limit = int(_LOWER * min(self.limit, self.device.peak()))
        self.lowered += 1
        if self.rest is None:
            self.too_many = min(self.too_many or self.tokens, self.tokens)
        self.kept = self.reported = max(0, min(self._fit(), self.kept - 1))
        self.peak_before = self.device.peak()  # this peak is not that of the repeated step
        logger.warning(
            "out of memory: the step is repeated with %d of %d layers checkpointed",
            len(self.layers) - self.kept,
            len(self.layers),
        )
        return self.kept

    def _report(self) -> None:
        if self.rest is not None and self.kept != self.reported:
            self.reported = self.kept
            logger.info("activation_memory: %s", self)

    def __str__(self) -> str:
        if self.reported is None:
            return f"{self.requested}: not measured yet"
        is_auto = self.requested == "auto"
        budget = f"auto ({self.limit / GIB:.1f} GiB)" if is_auto else f"{self.requested} GiB"
        lowered = f"; lowered {self.lowered} times after running out" if self.lowered else ""
        total = len(self.layers)
        return (
            f"{budget}: {total - self.reported} of {total} layers checkpointed; "
            f"one that is not takes {self.cost * self.tokens / GIB:.2f} GiB more for {self.tokens} "
            f"tokens{lowered}"
        )


@dataclasses.dataclass
class EveryLayer(Budget):
    """Checkpoint every layer, because a budget cannot be kept for `reason`."""

    reason: str = ""

    def choose(self, tokens: int) -> int:
        self.kept = self.reported = 0
        return 0

    def check(self, is_first: bool) -> None:
        """Accept whatever a forward takes."""

    def __str__(self) -> str:
        return f"every layer is checkpointed: {self.reason}"


def budget_of(model: nn.Module) -> Budget | None:
    """Return the budget of an injected model, or of the one inside a wrapper.

    None if the model has no budget, or has not trained a step yet.
    """
    found = (vars(module).get("_liger_budget") for module in model.modules())
    return next((budget for budget in found if budget is not None), None)


def why_not(model: nn.Module) -> str | None:
    """Return the reason why no budget can be kept for `model`, or None."""
    parameters = list(model.parameters())
    if any(isinstance(p, DTensor) or not p.numel() for p in parameters):
        return "its weights are sharded, and every process would choose for itself"
    if len({p.device for p in parameters}) != 1:
        return "its weights lie on several devices"
    parallel = getattr(AcceleratorState(), "parallelism_config", None) if is_initialized() else None
    if getattr(parallel, "sp_size", 1) > 1:
        return "processes share its rows, and every process would choose for itself"
    return None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that can be checkpointed, only the outermost ones, in order."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(m) for m in module.modules())
    return found


def within_budget(budget: Budget, model: nn.Module, tokens: int, forward: Callable):
    """Return `forward()` of `model`, with as many layers checkpointed as the budget requires.

    If all are checkpointed, raises torch.OutOfMemoryError if memory still runs out, and ValueError
    if the first forward exceeds the requested number of GiB.
    """
    is_first = budget.reported is None
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
        # Outside of the handler, because its traceback holds the activations.
        kept = budget.lower()
        before.restore()
        before = before if kept else None


@contextlib.contextmanager
def _checkpointed(layers: list[nn.Module], count: int) -> Iterator[None]:
    """Checkpoint the first `count` layers, and no others, inside the block."""
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
    """Measure, in the first step, what the last layer keeps per token."""
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
        # A checkpointed layer keeps its input, which is as large as its output.
        budget.cost = max(kept - hidden.numel() * hidden.element_size(), 1) / budget.tokens

    handles = [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repeated(trainer: Trainer, model: nn.Module, step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return `step()`, a forward and backward; repeat it with fewer kept layers if memory runs out.

    Only a step in a single process can be repeated, and only if no gradients had accumulated.
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
