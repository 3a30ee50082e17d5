"""Two processes: a hook on the head under DDP, and experts that are spread."""

import inspect
import json

import expert_parallel
import hooked_ddp
import processes
import pytest
from transformers.distributed import DistributedConfig


def found_by(helper, folder) -> dict[str, list[str]]:
    """What a helper that runs in two processes found wrong, by case."""
    out = folder / "found.json"
    processes.start(2, helper.worker, str(out))
    return json.loads(out.read_text())


def test_a_hook_on_the_head_keeps_no_weight_out_of_ddps_search(tmp_path):
    found = found_by(hooked_ddp, tmp_path)
    assert len(found) == 16
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_spread_experts_train_as_without_kernels(tmp_path):
    if "ep_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this release of transformers spreads experts in another way")
    found = found_by(expert_parallel, tmp_path)
    assert found == {name: [] for name in expert_parallel.LAYOUTS}
