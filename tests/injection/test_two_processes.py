"""Two processes: a hook on the head under DDP, and experts that are spread."""

import inspect
import json
import subprocess
import sys

import expert_parallel
import hooked_ddp
import pytest
from transformers.distributed import DistributedConfig


def found_by(script, *arguments) -> dict[str, list[str]]:
    """What a helper that runs in two processes found wrong, by case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script.__file__, *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hook_on_the_head_keeps_no_weight_out_of_ddps_search():
    found = found_by(hooked_ddp)
    assert len(found) == 16
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_spread_experts_train_as_without_kernels(tmp_path):
    if "ep_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this release of transformers spreads experts in another way")
    found = found_by(expert_parallel, str(tmp_path))
    assert found == {name: [] for name in expert_parallel.LAYOUTS}
