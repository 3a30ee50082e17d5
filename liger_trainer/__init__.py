"""One flag makes HuggingFace training faster and leaner, and proves that it computes the same."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_MODULES = {
    "inject": "injection.walk",
    "restore": "injection.walk",
    "InjectionReport": "report",
    "KernelConfig": "config",
    "LigerTrainer": "trainer",
    "enable": "stock",
    "disable": "stock",
    "loss_scope": "deferred",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str):
    """Load a public name on first use, so that importing the package imports no trainer."""
    if name not in _MODULES:
        raise AttributeError(f"module 'liger_trainer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"liger_trainer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
