"""Which methods of TRL's trainers are replaced, and their rows in the injection report.

`trl/replacements.py` has the replacements. Further methods keep TRL's code, in which only the names
of functions that take whole logits stand for ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType

from transformers import Trainer

from liger_trainer.report import Row, Status
from liger_trainer.request import config_of
from liger_trainer.source import rebind
from liger_trainer.trl.replacements import FUNCTIONS, METHODS, defers, in_loss_scope


def overrides(trainer: type) -> dict[str, object]:
    """Return attributes for the subclass that `trl.fused` makes of `trainer`.

    A method that a user's subclass of TRL's trainer overrides is not replaced.
    """
    names: dict[str, object] = {}
    for cls in trainer.__mro__:
        if not cls.__module__.startswith("trl."):
            continue
        special = METHODS.get(cls.__qualname__, {})
        for name, attribute in vars(cls).items():
            if name in names or _owner(trainer, name) is not cls or name == "__init__":
                continue
            if name in special:
                make, reason = special[name]
                names[name] = _marked(make(attribute), f"{cls.__qualname__}.{name}", reason)
            elif (rebound := _rebound(attribute)) is not None:
                changed, functions = rebound
                reason = f"its {' and '.join(functions)} takes deferred logits"
                names[name] = _marked(changed, f"{cls.__qualname__}.{name}", reason)
    return names


def _marked(attribute: object, site: str, reason: str) -> object:
    getattr(attribute, "__func__", attribute)._liger_override = site, reason
    return attribute


def override_rows(trainer: Trainer) -> Iterator[Row]:
    """Yield a row of the injection report for each of `overrides` that the trainer has."""
    names = ("model", "teacher_model")
    models = {name: getattr(trainer, name, None) for name in names}
    plain = [name for name, m in models.items() if m is not None and not defers(trainer, m)]
    refused = Status.REFUSED if config_of(trainer).fused_linear_cross_entropy else Status.OFF
    for cls in type(trainer).__mro__:
        for name, attribute in vars(cls).items():
            mark = getattr(getattr(attribute, "__func__", attribute), "_liger_override", None)
            if mark is None or _owner(type(trainer), name) is not cls:
                continue
            site, reason = mark
            status = refused if plain else Status.SWAPPED
            if plain:
                reason = f"TRL's own: the logits of {' and '.join(plain)} are not deferred"
            if (unused := _why_unused(trainer, name)) is not None:
                status, reason = Status.NOT_APPLICABLE, unused
            yield Row(site, "trl", status, reason)


def _why_unused(trainer: Trainer, name: str) -> str | None:
    """Return why a method is not called, or None: ORPO and CPO use one of two to score pairs."""
    encoder_decoder = getattr(trainer, "is_encoder_decoder", None)
    if name == "concatenated_forward" and encoder_decoder:
        return "TRL's own: an encoder-decoder is scored by get_batch_logps"
    if name == "get_batch_logps" and encoder_decoder is False:
        return "not called: concatenated_forward scores the tokens"
    return None


def _owner(trainer: type, name: str) -> type | None:
    return next((cls for cls in trainer.__mro__ if name in vars(cls)), None)


def _rebound(attribute: object) -> tuple[object, list[str]] | None:
    """Return `attribute` with TRL's functions replaced by ours, and their names; None if it has
    none."""
    function = getattr(attribute, "__func__", attribute)
    if not isinstance(function, FunctionType):
        return None
    changed, names = function, []
    for name, make in FUNCTIONS.items():
        original = _global(function, name)
        rebound = None if original is None else rebind(changed, original, make(original))
        if rebound is not None:
            changed = rebound
            names.append(name)
    if not names:
        return None
    changed = in_loss_scope(changed)
    if function is not attribute:  # a static or class method
        changed = type(attribute)(changed)
    return changed, names


def _global(function: FunctionType, name: str) -> object | None:
    module = sys.modules.get(function.__module__)
    return getattr(module, name, None)
