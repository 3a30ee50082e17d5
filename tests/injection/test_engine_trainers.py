"""The quick cells of the trainers' matrix; `python tests/helpers/engine_trainers.py` has all."""

import engine_trainers
import pytest

CELLS = [("CP", "Trainer"), ("HSDP", "Trainer"), ("TP", "DPO"), ("TP", "ORPO")]
REFUSED = ("CP", "DPO")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainers") / "cells.json"
    return engine_trainers.matrix([*CELLS, REFUSED], str(out))


@pytest.mark.parametrize(("engine", "method"), CELLS)
def test_training_is_fused_and_that_of_the_plain_trainer(engine, method, cells):
    assert cells[engine][method] == "=, fused"


def test_a_trainer_that_compares_whole_rows_is_refused_where_they_are_split(cells):
    """TRL's own fails too, with a message about sizes of tensors."""
    engine, method = REFUSED
    assert cells[engine][method].startswith("ValueError: DPOTrainer needs whole rows")
    assert "(plain: RuntimeError" in cells[engine][method]
