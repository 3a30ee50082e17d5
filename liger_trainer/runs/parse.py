"""YAML to plain values: the part of YAML 1.2 that a recipe needs, and one line about what is not.

Plain values are None, booleans, numbers, strings, lists and dictionaries: what JSON holds too.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_MOST_NODES = 100_000  # after aliases are expanded; the largest recipe has a few hundred


class _Loader(yaml.SafeLoader):
    """YAML 1.2: `2e-5` is a float, `no` and dates are text; and no key appears twice."""

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
    """Return the plain value that `text` is in YAML.

    Raises ValueError, in one line, for what is not YAML, holds a key twice, is too large once its
    aliases are expanded, contains itself, or is no plain value (a set, binary data, a NaN).
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _plain(value, "")


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the number of nodes below and with `node`, each alias counted as what it stands
    for."""
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
    if size > _MOST_NODES:
        raise ValueError(f"more than {_MOST_NODES:,} values once aliases are expanded")
    known[id(node)] = size
    return size


def _plain(value: Any, where: str) -> Any:
    """Return a copy in which nothing is shared. Raises ValueError for what is no plain value."""
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
