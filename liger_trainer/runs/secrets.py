"""Mask tokens and passwords wherever a recipe is printed or written. A leaf."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(^|_)(password|passwd|secret|api_?key|access_key|private_key|credentials?)($|_)"
    r"|^((hub|push_to_hub|auth|access|api|hf|wandb)_)?token$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")  # user:password@


def is_secret(name: str) -> bool:
    """Return whether a key, such as `model.token`, names a secret."""
    return bool(_NAMES.search(str(name).rpartition(".")[2]))


def hidden(value: Any, name: str = "") -> Any:
    """Return `value` with secrets masked: values of secret keys, and passwords in URLs."""
    if is_secret(name):
        return value if value is None or isinstance(value, bool) else HIDDEN
    if isinstance(value, dict):
        return {key: hidden(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [hidden(item) for item in value]
    return _IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def hidden_override(override: str) -> str:
    """Return `section.key=value` with secrets masked, for a command line that is printed."""
    key, equals, value = override.partition("=")
    words = re.findall(r"\w+", value) if "{" in value else ()  # a YAML flow is masked as a whole
    secret = is_secret(key) or any(is_secret(word) for word in words)
    return key + equals + (HIDDEN if secret else hidden(value))
