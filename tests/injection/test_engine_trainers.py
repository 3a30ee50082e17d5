"""The quick cells of the trainers' matrix; `python tests/helpers/engine_trainers.py` has all."""

import json
import subprocess
import sys

import engine_trainers
import pytest

CELLS = [("CP", "Trainer"), ("TP", "DPO"), ("TP", "ORPO")]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainers") / "cells.json"
    command = [sys.executable, engine_trainers.__file__, "--json", str(out)]
    command += ["--cells", *(",".join(cell) for cell in CELLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(("engine", "method"), CELLS)
def test_training_is_fused_and_that_of_the_plain_trainer(engine, method, cells):
    assert cells[engine][method] == "=, fused"
