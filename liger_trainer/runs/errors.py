"""Errors of runs. Wrong input raises ValueError or OSError instead. A leaf."""

from __future__ import annotations


class RunError(RuntimeError):
    """Training failed; the message states why, and where to continue."""


class ReportedElsewhere(Exception):  # noqa: N818 (it is not an error itself)
    """Another process of the run has failed and reports the reason."""
