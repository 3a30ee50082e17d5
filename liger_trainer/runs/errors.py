"""How runs fail, apart from wrong input, which is a ValueError or an OSError. A leaf."""

from __future__ import annotations


class RunError(RuntimeError):
    """Training failed; the message says why, and what is left of it."""


class ReportedElsewhere(Exception):  # noqa: N818 (it is no error of its own)
    """Another process of the run has failed, and says why."""
