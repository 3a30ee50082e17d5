"""Calls of heads that compute all logits."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from liger_trainer.deferred import logits


@contextlib.contextmanager
def counted() -> Iterator[mock.Mock]:
    """Count such calls, as `call_count` of what is yielded."""
    calls = mock.Mock(wraps=logits.plain_call)
    with mock.patch.object(logits, "plain_call", calls):
        yield calls
