"""Fixtures of the tests of TRL's trainers."""

from repeated import looked_up_once, never_hashed, proven_once

__all__ = ["looked_up_once", "never_hashed", "proven_once"]
