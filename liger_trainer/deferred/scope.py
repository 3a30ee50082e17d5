"""When logits are deferred: only while a loss is computed.

A head returns deferred logits in a forward that is given labels, and inside `loss_scope()`, which
trainers open around their loss. Every other forward returns the plain tensor.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn


class Scope:
    """The span of one loss computation; weights do not change while it is open."""

    open = True


RECORDED = Scope()
"""The scope of a composite head's terms, which are consumed immediately."""


class _State(threading.local):
    scope: Scope | None = None
    head: nn.Module | None = None  # the head whose calls are deferred now
    recording = False  # inside a composite head, whose linear layers return their terms
    plain_calls = 0  # calls of a deferred head for all of its logits


_state = _State()


@contextlib.contextmanager
def loss_scope() -> Iterator[None]:
    """Defer the logits of every injected model inside the block, for a custom loss:

        with loss_scope():
            logits = model(input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    The loss is then fused with the head. Any other use of the logits computes them. A forward that
    gets labels needs no scope.
    """
    if _state.scope is not None:  # the outer scope ends later
        yield
        return
    scope = _state.scope = Scope()
    try:
        yield
    finally:
        scope.open, _state.scope = False, None


def in_loss_scope() -> bool:
    """Return whether a loss scope is open in this thread."""
    return _state.scope is not None


@contextlib.contextmanager
def deferring(head: nn.Module) -> Iterator[None]:
    """Defer calls of `head` inside the block."""
    before = _state.head
    with loss_scope():
        _state.head = head
        try:
            yield
        finally:
            _state.head = before


def scope_of(head: nn.Module) -> Scope | None:
    """Return the scope in which calls of `head` are deferred; None if they are not."""
    return _state.scope if _state.head is head else None


def count_plain_call() -> None:
    _state.plain_calls += 1


def plain_calls() -> int:
    """Return how often a deferred head has computed all of its logits in this thread."""
    return _state.plain_calls


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Make linear layers onto the vocabulary return deferred logits inside the block."""
    before, _state.recording = _state.recording, True
    try:
        yield
    finally:
        _state.recording = before


def is_recording() -> bool:
    """Return whether linear layers return their terms; see `recording`."""
    return _state.recording
