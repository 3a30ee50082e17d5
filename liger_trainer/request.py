"""Whether a trainer uses the kernels: by its own argument, its training arguments, or neither."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from liger_trainer.config import KernelConfig

FLAG, CONFIG = "use_liger_kernel", "liger_kernel_config"
Request = bool | Mapping[str, bool | str | float] | None


def requested(args: Any, own: Request = None) -> KernelConfig | None:
    """Return the switches to run with, or None for no kernels.

    Args:
        args: the training arguments. `use_liger_kernel=True` requests kernels, with the switches of
            `liger_kernel_config`; so does `model_init_kwargs={"use_kernels": True}`, with which TRL
            means to replace that flag. The fields may be missing.
        own: the trainer's own `liger_kernel_config`: True or switches request kernels, False
            refuses them, and None leaves the decision to `args`.

    Raises ValueError for an unknown switch.
    """
    if own is not None:
        return None if own is False else KernelConfig.from_dict(None if own is True else own)
    if getattr(args, FLAG, False) or names_kernels(getattr(args, "model_init_kwargs", None)):
        return KernelConfig.from_dict(getattr(args, CONFIG, None))
    return None


def config_of(trainer: Any) -> KernelConfig | None:
    """Return the switches requested of a trainer of any class, or None for no kernels."""
    return requested(trainer.args, vars(trainer).get("_requested"))


def names_kernels(model_init_kwargs: Any) -> bool:
    """Return whether `model_init_kwargs` has `use_kernels=True`."""
    return isinstance(model_init_kwargs, Mapping) and bool(model_init_kwargs.get("use_kernels"))


@contextlib.contextmanager
def hidden(args: Any) -> Iterator[None]:
    """Hide the request in `args` inside the block: others read it as one for another package."""
    had_flag = getattr(args, FLAG, False)
    kwargs = getattr(args, "model_init_kwargs", None)
    try:
        if had_flag:
            setattr(args, FLAG, False)
        if names_kernels(kwargs):
            args.model_init_kwargs = {k: v for k, v in kwargs.items() if k != "use_kernels"}
        yield
    finally:
        if had_flag:
            setattr(args, FLAG, True)
        if names_kernels(kwargs):
            args.model_init_kwargs = kwargs
