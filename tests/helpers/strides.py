"""Ways in which a norm's input may lie in memory."""

import pytest

views_of_x = pytest.mark.parametrize(
    "view",
    [
        lambda packed: packed[..., 16:80],
        lambda packed: packed[::2],
        lambda packed: packed.transpose(0, 1),
        lambda packed: packed.transpose(0, 2),
        lambda packed: packed[:1].expand(3, -1, -1),
        lambda packed: packed[0, ::3],
    ],
    ids=["sliced", "every other", "transposed", "inner transposed", "expanded", "row stride"],
)
