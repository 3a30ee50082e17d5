"""Check plain values against the annotations of a dataclass: unknown keys, wrong types."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from liger_trainer.runs.secrets import hidden

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
}


def known(
    where: str,
    given: Iterable[str],
    names: list[str],
    elsewhere: Callable[[str], str | None] = lambda key: None,
) -> None:
    """Raise ValueError for a key that is not in `names`.

    The message suggests the key of another section that `elsewhere` finds by that name, or else the
    nearest of `names`.
    """
    for key in given:
        if key not in names:
            other = elsewhere(str(key))
            close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            if other is not None:
                hint = f"did you mean {other}?"
            else:
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def convert(where: str, value: Any, hint: Any) -> Any:
    """Return `value` if the annotation admits it; convert an integer if only a float is admitted.

    Raises ValueError otherwise.
    """
    if admits(hint, value):
        return value
    if _is_int(value) and admits(hint, float(value)):
        return float(value)
    raise ValueError(f"{where}: {hidden(value, where)!r} is not {_words(hint)}")


def filled(where: str, given: Any, cls: type) -> Any:
    """Return an instance of the dataclass `cls` with the values of a mapping.

    Raises ValueError if `given` is not a mapping, has an unknown key or a value of the wrong type.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected keys and values, found {hidden(given)!r}")
    known(where, given, [f.name for f in dataclasses.fields(cls)])
    hints = typing.get_type_hints(cls)
    return cls(**{k: convert(f"{where}.{k}", v, hints[k]) for k, v in given.items()})


def admits(hint: Any, value: Any) -> bool:
    """Return whether a value from YAML fits an annotation; types that YAML lacks are admitted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(admits(a, value) for a in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is not None:
        return isinstance(value, origin)
    if hint is int:
        return _is_int(value)
    if hint in (bool, float, str, list, dict):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint is types.NoneType:
        return value is None
    return hint is Any or (dataclasses.is_dataclass(hint) and value is not None)


def _words(hint: Any) -> str:
    """Return what a value of an annotation is, for messages: "a number", "text or a list"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        told = [_words(a) for a in arguments if a is not types.NoneType]
        return " or ".join(dict.fromkeys(told))
    if origin is typing.Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return _NAMES.get(origin or hint, "a mapping")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
