"""Change what one module instance computes, and change it back.

A swap replaces the instance's class with a subclass made for it. Parameters, hooks, names and
`isinstance` stay as they are, copies and pickles work, and other instances are not affected.
Calling the new class creates an instance of the plain one. Classes that are put on top later
(FSDP2, parametrizations) stay when the swap below them is undone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import nn

from liger_trainer.report import Site, Status
from liger_trainer.source import Source


class _SwappedType(type):
    def __call__(cls, *args, **kwargs):
        return plain_class(cls)(*args, **kwargs)


class Swapped(metaclass=_SwappedType):
    """The first base of every swapped class. The hashable `key` parameterizes the swap."""

    _liger_base: type
    _liger_source: Source
    _liger_key: tuple = ()
    _liger_site: Site | None = None

    @classmethod
    def namespace(cls, base: type, *key) -> dict[str, object]:
        """Return further attributes for the class that is made for `base`."""
        return {}

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(protocol)
        cls, swaps = type(self), []
        while "_liger_base" in vars(cls):
            swaps.append((cls._liger_mixin, *cls._liger_key))
            cls = cls._liger_base
        if not self._liger_source.is_current:  # no swap holds for what the copy's class computes
            swaps = []
        return _new_instance, (cls, *reversed(swaps)), *rest


def _new_instance(cls: type, *swaps: tuple):
    """Return an empty instance of `cls` with the swaps (mixin, *key) applied in order."""
    for mixin, *key in swaps:
        cls = swapped_class(cls, mixin, *key)
    return cls.__new__(cls)


def swapped_class(base: type, mixin: type[Swapped], *key) -> type:
    """Return the subclass of `base` with `mixin` first; it keeps the name, which HF reads."""
    return _swapped_class(base, mixin, Source(_below_swaps(base)), *key)


@functools.cache
def _swapped_class(base: type, mixin: type[Swapped], source: Source, *key) -> type:
    return _metaclass(type(base))(
        base.__name__,
        (mixin, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_liger_base": base,
            "_liger_mixin": mixin,
            "_liger_key": key,
            "_liger_source": source,
            **mixin.namespace(base, *key),
        },
    )


PATCHED = "its code was patched after the injection; call inject(model) again"


def is_current(module: Swapped) -> bool:
    """Return whether the code of the module's class is still what its swap was made of.

    If not, record that in the report. Compiled code is taken as it was when it was traced.
    """
    if torch.compiler.is_compiling() or type(module)._liger_source.is_current:
        return True
    note(module, PATCHED)
    return False


def while_current(base: type, forward: Callable) -> Callable:
    """Return `forward`, made of that of `base`, as long as the code of `base` stays as it is."""

    @functools.wraps(base.forward)
    def run(self, *args, **kwargs):
        plain = base.forward  # read in each call, because it may have been patched
        return (forward if is_current(self) else plain)(self, *args, **kwargs)

    return run


def _below_swaps(cls: type) -> type:
    while "_liger_base" in vars(cls):
        cls = cls._liger_base
    return cls


@functools.cache
def _metaclass(of_base: type) -> type:
    if issubclass(_SwappedType, of_base):
        return _SwappedType
    return of_base if issubclass(of_base, _SwappedType) else type("_", (_SwappedType, of_base), {})


@functools.cache
def plain_class(cls: type) -> type:
    """Return `cls` without its swaps, but with classes that were put on top of them."""
    if not issubclass(cls, Swapped):
        return cls
    if "_liger_base" in vars(cls):
        return plain_class(cls._liger_base)
    names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(plain_class, cls.__bases__)), names)


def swap(module: nn.Module, mixin: type[Swapped], *key) -> None:
    """Swap the class of `module` for a subclass with `mixin`, parameterized by `key`."""
    _change_class(module, swapped_class(type(module), mixin, *key))


def _change_class(module: nn.Module, cls: type) -> None:
    own = [name for name in _FORWARDS if _is_own(vars(module).get(name), module)]
    module.__class__ = cls
    for name in own:
        vars(module)[name] = MethodType(cls.forward, module)


# accelerate's `device_map` and offloading put a forward on the instance, which calls the module's
# own forward by the second name.
_FORWARDS = ("forward", "_old_forward")
PLACED = (*_FORWARDS, "_hf_hook")


def _is_own(method: object, module: nn.Module) -> bool:
    """Return whether `method` is the forward of the module's class."""
    bound = isinstance(method, MethodType) and method.__self__ is module
    return bound and method.__func__ is type(module).forward


def has_foreign_forward(module: nn.Module) -> bool:
    """Return whether the instance has a forward that may not call that of its class."""
    own = vars(module)
    placed = "_hf_hook" in own and _is_own(own.get("_old_forward"), module)
    return "forward" in own and not placed and not _is_own(own["forward"], module)


def note(module: Swapped, reason: str | None, status: Status = Status.REFUSED) -> None:
    """Record in the report why `module` runs as in the plain model, or None if it runs fused."""
    site = module._liger_site
    if site is not None and site.reason != reason:
        site.runs(reason, status)


def is_swapped(module: nn.Module) -> bool:
    """Return whether the class of `module` is swapped."""
    return isinstance(module, Swapped)


def unswap(module: nn.Module) -> None:
    """Give a swapped module its own class back; other modules do not change."""
    if not isinstance(module, Swapped):
        return
    _change_class(module, plain_class(type(module)))
    for name in [name for name in vars(module) if name.startswith("_liger_")]:
        delattr(module, name)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
VALUES = (int, float, str, bool, tuple, type(None), torch.dtype)
_BY_REFERENCE = (FunctionType, BuiltinFunctionType, type)  # copies share these objects


def own_attributes(module: nn.Module) -> list[tuple[str, object]]:
    """Return the instance's attributes that not every module has, sorted by name."""
    return [(k, v) for k, v in sorted(vars(module).items()) if k not in _OF_EVERY_MODULE]


@dataclasses.dataclass(frozen=True)
class Proven:
    """The state of a module for which a kernel was verified to be equal.

    Attributes that are not plain values are left out, because they cannot be compared.
    """

    attributes: tuple[tuple[str, object], ...]  # includes parameters that are None
    parameters: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> Proven:
        kinds = (*VALUES, *_BY_REFERENCE)
        attributes = [(k, v) for k, v in own_attributes(module) if isinstance(v, kinds)]
        attributes += [(k, v) for k, v in module._parameters.items() if v is None]
        return cls(tuple(attributes), frozenset(module._parameters))

    def holds(self, module: nn.Module) -> bool:
        """Return whether `module` is still in that state, in well below a microsecond."""
        for name, value in self.attributes:
            current = getattr(module, name, _MISSING)
            if current is not value and (type(current) is not type(value) or current != value):
                return False
        return module._parameters.keys() == self.parameters


_MISSING = object()


def holds(module: Swapped, proven: Proven) -> bool:
    """Return whether `module` and its class's code are still as they were verified.

    If not, record that in the report.
    """
    if not proven.holds(module):
        note(module, "its attributes or parameters were changed after the injection")
        return False
    return is_current(module)
