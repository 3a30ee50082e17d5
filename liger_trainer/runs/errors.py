"""Errors of runs, and the end of a message about a missing file. A leaf.

Wrong input raises ValueError or OSError instead.
"""

from __future__ import annotations

import difflib
from pathlib import Path


class RunError(RuntimeError):
    """Training failed; the message states why, and where to continue."""


class ReportedElsewhere(Exception):  # noqa: N818 (it is not an error itself)
    """Another process of the run has failed and reports the reason."""


def suggest_path(path: Path) -> str:
    """Return the end of a message about a missing file: its folder, and similar names in it."""
    path = path.absolute()
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [n for n in names if n.endswith(path.suffix)][:5]
    return f" in {path.parent}" + (f"; there is {', '.join(close)}" if close else "")
