"""Parse YAML to plain values: the part of YAML 1.2 that a recipe needs.

Plain values are those of JSON: None, booleans, numbers, strings, lists and dictionaries.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_MAX_NODES = 100_000  # after aliases are expanded; the largest recipe has a few hundred


class _Loader(yaml.SafeLoader):
    """A loader for YAML 1.2: `2e-5` is a float, `no` and dates are text, keys must be unique."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        first: [(tag, p) for tag, p in found if not tag.endswith((":timestamp", ":bool"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """Return the plain value of a YAML text.

    Raises ValueError, in one line, for text that is not YAML, has a duplicate key, is too large
    once aliases are expanded, contains itself, or holds values that are not plain (a set, binary
    data, a NaN).
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or ""
        if not problem or problem.startswith("but "):
            problem = ", ".join(part for part in (error.context, problem) if part)
        raise ValueError(f"{problem}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _plain(value, "")


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the number of nodes in `node`, including itself, with aliases expanded."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("an alias refers to a value that contains it")
        return size
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_count(child, known) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_count(part, known) for pair in node.value for part in pair)
    if size > _MAX_NODES:
        raise ValueError(f"more than {_MAX_NODES:,} values once aliases are expanded")
    known[id(node)] = size
    return size


def _plain(value: Any, where: str) -> Any:
    """Return a copy without shared parts. Raises ValueError for values that are not plain."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise ValueError(f"{where or 'a key'}: {key!r} is not a name")
        return {k: _plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{where or 'the value'}: not a number")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(
        f"{where or 'the value'}: a {type(value).__name__} is neither text, number, list nor "
        "mapping; put it in quotes"
    )
