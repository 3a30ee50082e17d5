"""Architectures of many kinds: with kernels, each trains as without. `architectures.py` has all."""

import pytest
import transformers
from architectures import compare, names
from packaging.version import Version

CAUSAL = """
afmoe apertus arcee bamba bloom cohere2 deepseek_v3 deepseek_v32 doge ernie4_5 exaone4 falcon
falcon_h1 gemma3n_text gemma4_text glm4_moe gpt_neox gpt_oss granitemoe helium jamba kimi_linear
lfm2 llama4_text longcat_flash minimax modernbert-decoder nanochat olmo3 olmoe opt phimoe
qwen2_moe qwen3_5_text qwen3_next qwen4_exp_text reformer stablelm starcoder2 zamba2
"""
IMAGE_TEXT = ["gemma3", "mllama", "qwen2_5_vl"]
CASES = [("causal", name) for name in CAUSAL.split()] + [
    ("image-text", name) for name in IMAGE_TEXT
]


@pytest.mark.parametrize(("task", "model_type"), CASES, ids=lambda case: case)
def test_trains_as_without_kernels(task, model_type):
    if model_type not in names(task):
        pytest.skip(f"this transformers has no {model_type}")
    if model_type == "qwen4_exp_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers has no indexed attention yet")
    found = compare(task, model_type)
    assert found.images == (task == "image-text")
    assert found.equal, f"loss {found.loss:.1e}, gradients {found.gradient:.1e}\n{found.report}"
    assert any(coverage.swapped for coverage in found.report.coverage.values())
