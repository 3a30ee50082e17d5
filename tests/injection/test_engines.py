"""The quick rows of the engine matrix; `python tests/helpers/engines.py --matrix` has all."""

import engines
import pytest

ROWS = ["DDP, find_unused_parameters", "FSDP1", "FSDP2, head in the root", "FSDP2, head a unit"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return engines.matrix(ROWS, str(tmp_path_factory.mktemp("engines") / "cells.json"))


@pytest.mark.parametrize("row", ROWS)
def test_every_loss_is_fused_and_that_of_one_process(row, cells):
    wrong = {column: cell for column, cell in cells[row].items() if cell != "=, fused"}
    if row == "FSDP2, head a unit":  # torch refuses a tied head there, without kernels too
        wrong = {column: cell for column, cell in wrong.items() if "plain too" not in cell}
    assert not wrong
