"""The code of functions and classes: what its names stand for, and copies with other names."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from types import CellType, FunctionType

from torch import nn


class Source:
    """The code of a class's forward, and what its names stand for, as they were.

    The names are those of globals and of the class's own methods, in the forward and in what it
    calls of its class and source file. A swap is made of this code or proven against it, and holds
    no longer if somebody patches it.
    """

    def __init__(self, cls: type):
        self._cls = cls
        methods, scopes = _names_read_by(cls)
        reads = [(cls, operator.attrgetter(*methods))]
        reads += [(scope, operator.itemgetter(*names)) for scope, names in scopes]
        self._reads = [(owner, read, read(owner)) for owner, read in reads]

    @property
    def is_current(self) -> bool:
        """Whether the code is still that; takes half a microsecond."""
        try:
            for owner, read, values in self._reads:
                if not all(map(operator.is_, read(owner), values)):
                    return False
        except (AttributeError, KeyError):  # a name is gone
            return False
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Source) or self._cls is not other._cls:
            return False
        ours, theirs = ([id(v) for *_, values in s._reads for v in values] for s in (self, other))
        return ours == theirs

    def __hash__(self) -> int:
        return hash(self._cls)


def _names_read_by(cls: type) -> tuple[list[str], list[tuple[dict, list[str]]]]:
    """Return the names of methods that the forward of `cls` reads, and of globals, by scope.

    The first name in each list comes twice, so that a getter of them always returns a tuple.
    """
    methods, scopes = {"forward": None}, {}
    queue, visited = [getattr(cls, "forward", None)], set()
    while queue:
        function = queue.pop()
        if not isinstance(function, FunctionType) or function in visited:
            continue
        visited.add(function)
        names, scope = sorted(_names(function.__code__)), function.__globals__
        own = [n for n in names if isinstance(getattr(cls, n, None), FunctionType)]
        own = [n for n in own if not hasattr(nn.Module, n)]
        found = [n for n in names if n in scope]
        methods |= dict.fromkeys(own)
        scopes.setdefault(id(scope), (scope, {}))[1].update(dict.fromkeys(found))
        called = [getattr(cls, n) for n in own] + [scope[n] for n in found]
        queue += [f for f in called if getattr(f, "__module__", None) == cls.__module__]
        queue += map(_content, function.__closure__ or ())

    def doubled(names: dict[str, None]) -> list[str]:
        return [*names, next(iter(names))]

    return doubled(methods), [(scope, doubled(names)) for scope, names in scopes.values() if names]


def rebind(function: FunctionType, old: object, new: object) -> FunctionType | None:
    """Return a copy of `function` in which global names for `old` refer to `new`, or None.

    None means that it has no such name. The code object is shared, and the original is not changed.
    Decorated functions are followed into their closures.
    """
    return _rebind(function, old, new, visited=set())


def _rebind(function, old, new, visited: set[int]) -> FunctionType | None:
    if id(function) in visited:  # a closure that refers to itself
        return None
    visited.add(id(function))
    names = [n for n in _names(function.__code__) if function.__globals__.get(n) is old]
    cells = [_rebind_cell(cell, old, new, visited) for cell in function.__closure__ or ()]
    if not names and not any(changed for _, changed in cells):
        return None
    scope = function.__globals__
    if names:
        scope = {**scope, **dict.fromkeys(names, new)}
        # torch.compile would look up the globals of a named module in that module.
        scope.pop("__name__", None)
    copy = FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        tuple(cell for cell, _ in cells) or None,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


def _names(code) -> set[str]:
    """Return the global names in the code and in the functions that it defines."""
    nested = (c for c in code.co_consts if hasattr(c, "co_names"))
    return set(code.co_names).union(*map(_names, nested))


def _rebind_cell(cell: CellType, old, new, visited) -> tuple[CellType, bool]:
    content = _content(cell)
    if isinstance(content, FunctionType):
        copy = _rebind(content, old, new, visited)
        if copy is not None:
            return CellType(copy), True
    return cell, False


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def referenced_globals(function: FunctionType) -> list[object]:
    """Return the objects that the global names of the function and its closures refer to."""
    return [scope[name] for scope, name in _global_names(function)]


def _global_names(function: FunctionType) -> Iterator[tuple[dict[str, object], str]]:
    """Yield the global names of the function and its closures, each with the scope it is in."""
    queue, visited = [function], set()
    while queue:
        current = queue.pop()
        if id(current) in visited:
            continue
        visited.add(id(current))
        scope = current.__globals__
        yield from ((scope, n) for n in sorted(_names(current.__code__)) if n in scope)
        contents = map(_content, current.__closure__ or ())
        queue += [content for content in contents if isinstance(content, FunctionType)]
