"""Kernels compile for a GPU, also where the tests run them in Triton's interpreter alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "helpers" / "compile_for_gpu.py"


def test_every_kernel_compiles_for_sizes_of_one_and_others():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
