"""Files that users name: variables in paths, text, what to suggest for a missing one. A leaf."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$(?=\w|\{\w+\})\{?(\w+)")


def expanded(where: str, value: Any) -> Any:
    """Return paths with `~` and variables expanded: one, several, or those in `data.mix`.

    Raises ValueError for a variable that is not set.
    """
    if isinstance(value, list):
        return [expanded(where, item) for item in value]
    if isinstance(value, dict):
        return {k: expanded(where, v) if k == "path" and v else v for k, v in value.items()}
    if not isinstance(value, str):
        return value
    unset = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    if unset:
        raise ValueError(f"{where}: the environment variable {unset[0]} is not set")
    return os.path.expanduser(os.path.expandvars(value))


def read_text(path: Path) -> str:
    """Return the contents of a text file, without a byte order mark.

    Raises ValueError if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def suggest_path(path: Path) -> str:
    """Return the end of a message about a missing file: its folder, and similar names in it."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [n for n in names if n.endswith(path.suffix)][:5]
    return f" in {path.parent}" + (f"; there is {', '.join(close)}" if close else "")
