"""TRL's trainers on this package's kernels: same names, arguments, configs and metrics.

    from liger_trainer.trl import DPOConfig, DPOTrainer

`use_liger_kernel=True` in the config injects the kernels into policy, reference and teacher, and
scores tokens through this package's head. With the flag off, each class is exactly TRL's. Classes
are created on first use, which imports TRL; `fused(MyTrainer)` creates one for your own subclass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from liger_trainer.config import KernelConfig
from liger_trainer.injection.rules.head import defers_logits
from liger_trainer.injection.walk import inject, injected_config, restore_for
from liger_trainer.kernel_trainer import KernelTrainer
from liger_trainer.report import InjectionReport, Row, Status
from liger_trainer.request import FLAG, Request, config_of, hidden, requested
from liger_trainer.trainer_hook import handled_for
from liger_trainer.trl.checks import (
    check_adapter,
    check_examples,
    check_heads,
    check_options,
    check_ranks,
    check_reference,
)
from liger_trainer.trl.fused_head import attach_fused_head, has_adapter
from liger_trainer.trl.overrides import override_rows, overrides

_TRL_MODULES = {
    **dict.fromkeys(("Distillation", "DPO", "GRPO", "KTO", "Reward", "RLOO", "SFT"), "trl"),
    "CPO": "trl.experimental.cpo",
    "GKD": "trl.experimental.gkd",
    "GMPO": "trl.experimental.gmpo",
    "ORPO": "trl.experimental.orpo",
    "TPO": "trl.experimental.tpo",
}


def __getattr__(name: str) -> Any:
    for method, module in _TRL_MODULES.items():
        if name in (f"{method}Trainer", f"{method}Config"):
            found = getattr(_import(module), name)
            return fused(found) if name.endswith("Trainer") else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    kinds = ("Trainer", "Config")
    return sorted([*globals(), *(f"{method}{kind}" for method in _TRL_MODULES for kind in kinds)])


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("trl"):
            raise
        raise ImportError(f"{module} is not available: pip install 'trl>=1.16'") from error


@functools.cache
def fused(trainer: type[Trainer]) -> type[Trainer]:
    """Return a subclass of a TRL trainer that runs on this package's kernels if the flag is on."""
    if issubclass(trainer, FusedTrainer):
        return trainer
    names = {
        "__module__": __name__ if trainer.__module__.startswith("trl.") else trainer.__module__,
        "__doc__": trainer.__doc__,
        "__signature__": inspect.signature(trainer),
    }
    return type(trainer.__name__, (FusedTrainer, trainer), names | overrides(trainer))


class FusedTrainer(KernelTrainer):
    """The first base of every class that `fused` returns.

    `liger_kernel_config=True`, or switches, requests the kernels even without the flag in the
    training arguments; False refuses them whatever the flag is. `injection_report` states what was
    swapped in the policy; it is None without kernels.
    """

    def __init__(self, *args, liger_kernel_config: Request = None, **kwargs):
        given = _training_arguments(args, kwargs)
        self._requested = liger_kernel_config
        config = self._kernel_config = requested(given, liger_kernel_config)
        if config is None:
            super().__init__(*args, **kwargs)
            self._set_kernels()
            return
        if given is not None:
            check_options(type(self), given)
        flag = getattr(given, FLAG, False)
        # TRL reads the flag as a request for another package: it warns, changes the config and
        # refuses models.
        with hidden(given), self._fused_heads(config, given):
            super().__init__(*args, **kwargs)
        if flag:
            setattr(self.args, FLAG, True)
        self._set_kernels()
        self._report(override_rows(self))
        check_ranks(self)
        check_heads(self)
        check_examples(self)

    def _set_kernels(self) -> None:
        for name in ("model", "ref_model", "teacher_model"):
            model = getattr(self, name, None)
            if not isinstance(model, nn.Module):
                continue
            if config_of(self) is None:
                restore_for(model, self)
            elif injected_config(model) is not self._kernel_config:  # not injected by this trainer
                self._inject(model, self._kernel_config)

    def _inject(self, model: nn.Module, config: KernelConfig) -> None:
        report = inject(model, config)
        if self.injection_report is None:  # the policy is the first model
            self.injection_report = report

    def _report(self, rows: Iterable[Row]) -> None:
        self.injection_report = self.injection_report or InjectionReport(())
        self.injection_report.rows += tuple(rows)

    @contextlib.contextmanager
    def _fused_heads(self, config: KernelConfig, args: TrainingArguments) -> Iterator[None]:
        """Make the TRL modules of this trainer attach our head to models inside the block.

        TRL refuses an adapter on the head, because its own head would ignore it; ours does not.
        """
        from trl.trainer import utils

        original, weighting = utils.add_fused_lm_head, self._weighting(args)
        models: list[nn.Module] = []  # the policy, then its reference

        def add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=()):
            plain = vars(model).get("forward")  # set by others, such as hooks that move inputs
            original(model, temperature, cast_lm_head_to_fp32, outputs or ("log_probs",))
            models.append(model)
            check_reference(models[0], model)
            forward = model.forward
            self._inject(model, config)
            fused = config.fused_linear_cross_entropy and not cast_lm_head_to_fp32
            if fused:
                attach_fused_head(
                    model,
                    original=forward,
                    plain=plain,
                    temperature=temperature,
                    outputs=tuple(outputs),
                    weighting=weighting,
                )
            else:
                check_adapter(model)
            if len(models) == 1:
                self._report([_head_row(model, fused, cast_lm_head_to_fp32)])

        modules = {sys.modules[cls.__module__] for cls in type(self).__mro__}
        modules = [module for module in modules if hasattr(module, "add_fused_lm_head")]
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(_replaced(module, "add_fused_lm_head", add_fused_lm_head))
                if not getattr(args, "cast_lm_head_to_fp32", False):
                    stack.enter_context(_replaced(module, "BaseTunerLayer", _NeverMatches))
            yield

    def _weighting(self, args: TrainingArguments) -> str | None:
        """Return how SFT's loss weighs log-probabilities, if `SFTTrainer.compute_loss` computes
        it."""
        from trl.trainer.sft_trainer import SFTTrainer

        own = super(KernelTrainer, self).compute_loss.__func__ is SFTTrainer.compute_loss
        return _WEIGHTING.get(getattr(args, "loss_type", None)) if own else None

    def train(self, *args, **kwargs):
        self._set_kernels()
        with handled_for(self, lambda: None):  # the kernels are injected already
            return super().train(*args, **kwargs)


def _head_row(model: nn.Module, attached: bool, cast_to_fp32: bool) -> Row:
    """Return the row about the head that `model(..., fused_lm_head=True)`, TRL's call, uses."""
    if attached and defers_logits(model):
        status = Status.SWAPPED
        reason = "tokens are scored from the deferred logits of the model's own forward"
    elif attached and has_adapter(model):
        status = Status.REFUSED
        reason = "tokens are scored from whole logits: those of the adapter are not deferred"
    else:
        status = Status.REFUSED if attached else Status.OFF
        reason = "TRL's own: " + ("cast_lm_head_to_fp32" if cast_to_fp32 else "no deferred logits")
    return Row("add_fused_lm_head", "trl", status, reason)


_WEIGHTING = {"nll": "uniform", "dft": "probability"}


class _NeverMatches:
    """A class without instances: `isinstance(x, _NeverMatches)` is always False."""


_MISSING = object()


@contextlib.contextmanager
def _replaced(module, name: str, value: object) -> Iterator[None]:
    before = vars(module).get(name, _MISSING)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _training_arguments(args: tuple, kwargs: dict) -> TrainingArguments | None:
    candidates = [kwargs.get("args"), *args, *kwargs.values()]  # subclasses may rename the argument
    return next((a for a in candidates if isinstance(a, TrainingArguments)), None)


# --- for `liger_trainer.enable()` ----------------------------------------------------------------


def patch_classes() -> None:
    """Make TRL's own classes create instances of ours if the flag is on."""
    base = _import("trl.trainer.base_trainer")._BaseTrainer

    def make(cls, *args, **kwargs):
        given = _training_arguments(args, kwargs)
        own = kwargs.get("liger_kernel_config")
        return object.__new__(cls if requested(given, own) is None else fused(cls))

    base.__new__ = staticmethod(make)


def unpatch_classes() -> None:
    """Undo `patch_classes`."""
    base = _import("trl.trainer.base_trainer")._BaseTrainer
    if "__new__" in vars(base):
        # Deleting __new__ is not enough: the class would then pass its arguments to object.__new__.
        base.__new__ = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))
