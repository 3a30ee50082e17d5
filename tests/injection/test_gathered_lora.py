"""LoRA layers under ZeRO-3, which gathers the weights of each module when it is called."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")
import gathered_lora


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("gathered") / "found.json"
    command = [sys.executable, gathered_lora.__file__, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", gathered_lora.CASES)
def test_every_call_is_fused_and_trains_as_the_plain_model(case, found):
    recomputed = gathered_lora.STEPS if "checkpointed" in gathered_lora.CASES[case] else 0
    for process in found[case]:
        assert process["error"] <= 1
        assert process["whole"] <= 0  # nothing is held that the engine would have freed
        assert process["sites"] == 14
        assert process["fused"] == process["sites"] * (2 * gathered_lora.STEPS + recomputed)
