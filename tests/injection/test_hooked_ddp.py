"""A hook on the head keeps no weight out of DDP's search for unused parameters."""

import json
import subprocess
import sys

import hooked_ddp


def test_ddp_with_a_hook_on_the_head_trains_as_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, hooked_ddp.__file__], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 16
    assert not {name: wrong for name, wrong in found.items() if wrong}
