"""Plain data as bytes: what comes back is what was sent, and nothing else is read."""

import contextlib
import random
import sys

import pytest

from liger_trainer.runs.rewards.judge import wire

VALUES = [
    None, True, 0, -1, 10**400, 0.1, float("inf"), 1j, "\ud800é", b"\0", bytearray(b"x"), [],
    [[()]], {1: {2: {3}}}, frozenset({1}), range(3), {"a": [1, None]},
]  # fmt: skip


def test_plain_data_comes_back_as_it_was():
    for value in [*VALUES, VALUES]:
        again = wire.decode(wire.encode(value))
        assert again == value
        assert type(again) is type(value)
    assert list(wire.decode(wire.encode(iter([1, 2])))) == [1, 2]
    assert type(wire.decode(wire.encode(type("I", (int,), {})(3)))) is int


@pytest.mark.parametrize("value", [object(), len, type, [lambda: 1], sys])
def test_other_data_does_not_travel(value):
    with pytest.raises(TypeError):
        wire.encode(value)


def test_bytes_that_are_no_plain_data_are_refused():
    good, generator = wire.encode(VALUES), random.Random(0)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        data = bytes(data[: generator.randint(0, len(data))])
        with contextlib.suppress(ValueError):
            wire.decode(data)
    for data in (b"l1:" * 10**5, b"l99999999999:", b"e1:l0:", b"r1:N", b"x1:a", b"NN", b""):
        with pytest.raises(ValueError, match=r"plain data"):
            wire.decode(data)
