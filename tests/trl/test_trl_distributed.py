"""Two processes: the drop-in's losses, metrics and gradient norms are TRL's own, and fused.

One launch for each engine trains by every method, with TRL's trainer and with the drop-in.
"""

import json

import processes
import pytest
import trl_distributed


@pytest.fixture(scope="module", params=trl_distributed.ENGINES)
def logs(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "logs.json"
    processes.start(2, trl_distributed.worker, request.param, str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("method", trl_distributed.METHODS)
def test_two_processes(method, logs):
    *expected, _ = logs[f"{method} False"]
    *got, fused = logs[f"{method} True"]
    assert len(got) == len(expected) >= 2
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert fused == {"plain head calls": 0}
