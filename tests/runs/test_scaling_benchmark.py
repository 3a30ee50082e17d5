"""`benchmarks/scaling.py` on CPU processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_tiny_model_on_two_processes(tmp_path):
    pytest.importorskip("peft")
    kept = tmp_path / "scaling.json"
    words = ["--smoke", "--worlds", "2", "--case", "LoRA", "--json", kept]
    words += ["--engine", "fsdp2", "--variant", "liger-trainer"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "scaling.py", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    groups = json.loads(kept.read_text())["results"]["tiny LoRA, 64 | fsdp2 | liger-trainer"]
    assert len(groups["2"]["gib"]) == 2
    assert groups["2"]["communication"] > 0
    assert kept.with_suffix(".png").stat().st_size > 1000
    assert "| tiny LoRA, 64, fsdp2, liger-trainer | 1.00, " in done.stdout
