"""How runs fail, apart from wrong input, which is a ValueError or an OSError, and what a missing
file may have been. A leaf."""

from __future__ import annotations

import difflib
from pathlib import Path


class RunError(RuntimeError):
    """Training failed; the message says why, and what is left of it."""


class ToldElsewhere(Exception):  # noqa: N818 (it is no error of its own)
    """Another process of the run has failed, and says why."""


def near(path: Path) -> str:
    """Return a sentence that says where a missing file was looked for and what is there instead."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [n for n in names if n.endswith(path.suffix)][:5]
    return f" in {path.parent}" + (f"; there is {', '.join(close)}" if close else "")
