"""transformers' hook for a kernel package, which `use_liger_kernel=True` calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import transformers.trainer
from torch import nn

Hook = Callable[[nn.Module, "dict | None"], object]

_NAME = "apply_liger_kernel"


def current() -> Hook:
    """Return the function that the hook is set to."""
    return getattr(transformers.trainer, _NAME)


def replace(hook: Hook) -> None:
    """Set the hook to `hook`."""
    setattr(transformers.trainer, _NAME, hook)


@contextlib.contextmanager
def handled_for(owner: object, apply: Callable[[], object]) -> Iterator[None]:
    """Make the hook call `apply()` for `owner.model` inside the block, and the outer one for other
    models."""
    outer = current()

    def hook(model: nn.Module, kernel_config: dict | None):
        return apply() if model is owner.model else outer(model, kernel_config)

    replace(hook)
    try:
        yield
    finally:
        replace(outer)


def without_skip_logits(inputs: dict) -> dict:
    """Return `inputs` without `skip_logits`, which Trainer adds in evaluation for another kernel
    package (a PEFT wrapper would pass it on)."""
    return {name: value for name, value in inputs.items() if name != "skip_logits"}
