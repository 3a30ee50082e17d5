"""The quick rows of the engine matrix; `python tests/helpers/engines.py` has all."""

import importlib.util

import engines
import pytest
import tensor_parallel

ROWS = {
    "DDP, find_unused_parameters": "",
    "FSDP1": "",
    "FSDP2, head in the root": "",
    "FSDP2 by accelerate, bf16": "",
    "FSDP2 by accelerate, loaded by one process": "",
    "FSDP2, offloaded": "",
    "FSDP2, head a unit": "tied",  # torch refuses a tied head there, without kernels too
    "ZeRO-3": "",
    "TP": "LoRA",  # peft has no adapters for such a head
    "CP, ends and middle": "",
    "FSDP2 x TP": "LoRA",
    "FSDP2 x CP": "",
}
QUICK = ["labels, tied", "own loss, full", "log-probabilities, LoRA"]


def wrong(cells: dict[str, str], not_there: str) -> dict[str, str]:
    """Cells that are not equal and fused, but for those that the plain model cannot run either."""
    found = {column: cell for column, cell in cells.items() if cell != "=, fused"}
    excused = {
        c for c, cell in found.items() if not_there and not_there in c and "plain too" in cell
    }
    return {column: cell for column, cell in found.items() if column not in excused}


def can_run(row: str) -> bool:
    if row == "FSDP2 x TP" and not tensor_parallel.IS_SUPPORTED:
        return False
    return "ZeRO" not in row or importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("engines") / "cells.json")
    return engines.run_matrix([row for row in ROWS if can_run(row)], QUICK, out)


@pytest.mark.parametrize("row", ROWS)
def test_every_loss_is_fused_and_that_of_one_process(row, cells):
    if not can_run(row):
        pytest.skip("needs deepspeed, or a newer transformers")
    assert list(cells[row]) == [column for column in engines.COLUMNS if column in QUICK]
    assert not wrong(cells[row], ROWS[row])
