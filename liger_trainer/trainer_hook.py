"""transformers' hook for a kernel package: where `use_liger_kernel=True` takes effect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import transformers.trainer
from torch import nn

Hook = Callable[[nn.Module, "dict | None"], object]

_NAME = "apply_liger_kernel"


def current() -> Hook:
    return getattr(transformers.trainer, _NAME)


def replace(hook: Hook) -> None:
    setattr(transformers.trainer, _NAME, hook)


@contextlib.contextmanager
def handled_for(owner: object, apply: Callable[[], object]) -> Iterator[None]:
    """Within it, the hook calls `apply()` for `owner.model`; other models are handled as before."""
    outer = current()

    def hook(model: nn.Module, kernel_config: dict | None):
        return apply() if model is owner.model else outer(model, kernel_config)

    replace(hook)
    try:
        yield
    finally:
        replace(outer)


def without_request(inputs: dict) -> dict:
    """Return `inputs` without `skip_logits`, which Trainer adds in evaluation for another
    package's models (a PEFT wrapper would pass it on)."""
    return {name: value for name, value in inputs.items() if name != "skip_logits"}
