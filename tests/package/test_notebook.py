"""The notebook runs from top to bottom, and shows what it says."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first-run.ipynb"


def test_the_notebook_runs(capsys):
    pytest.importorskip("trl")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert names["fused"] == pytest.approx(names["plain"], rel=1e-4)
    assert names["fused"][-1] < 0.5 * names["fused"][0]
    assert "coverage: " in printed
    assert names["sft"].injection_report.coverage["fused_linear_cross_entropy"].swapped == 1
    assert float(names["with_kernels"]) == pytest.approx(float(names["without"]), rel=1e-5)
