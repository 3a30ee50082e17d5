"""The error by which a proof tells functions apart."""

import math

import pytest
import torch

from liger_trainer.injection.probe import relative_error

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),  # relative to the largest value
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([NAN, INF, -INF, 2.0], [NAN, INF, -INF, 2.0], 0.0),
        ([NAN, INF, 3.0], [NAN, INF, 4.0], 0.25),  # no infinity hides a difference
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN, 1.0], [INF, 1.0], INF),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [1.0, INF], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
    ],
)
def test_relative_error(got, truth, error):
    assert relative_error(torch.tensor(got), torch.tensor(truth)) == error
