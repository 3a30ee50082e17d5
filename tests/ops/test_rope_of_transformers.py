"""Rotary embedding: the reference in torch against the rotary functions of transformers' models."""

import importlib
import inspect

import pytest
import torch
from oracle import assert_matches, run
from rotary_inputs import DTYPES, complex_table, random_tables, transposed

from liger_trainer.kernels.layers.rope import rope

DEEPSEEK_V4 = {"interleaved": True, "narrow_table": True, "trailing": True, "keep_dtype": True}
THEIRS = [
    ("llama", 8, {}),
    ("phi3", 6, {}),
    ("olmo2", 8, {"keep_dtype": True}),
    ("cohere", 8, {"interleaved": True, "keep_dtype": True}),
    ("glm4", 8, {"interleaved": True, "half_table": True}),
    ("glm4", 4, {"interleaved": True, "half_table": True}),
    ("deepseek_v3", 8, {"interleaved": True, "split": True, "half_table": True}),
    ("gpt_oss", 8, {"narrow_table": True}),
    ("gemma3n", 8, {}),
    ("deepseek_v4", 8, DEEPSEEK_V4),
    ("deepseek_v4", 6, DEEPSEEK_V4),
]


@pytest.mark.parametrize(("model", "R", "options"), THEIRS, ids=lambda p: str(p) if p else "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["fp32_table", "same_table"])
def test_reference_is_bitwise_the_function_of_transformers(model, R, options, dtype, table_dtype):
    if model == "olmo2":
        table_dtype = torch.float32  # its rotary module returns fp32 whatever the model's dtype
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    q, k = (transposed(2, H, 3, 8, dtype, "cpu") for H in (4, 2))
    cos, sin = random_tables(2, 3, R, table_dtype or dtype, "cpu")
    if options.get("narrow_table"):
        cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    if options.get("split"):  # older versions of DeepSeek's read both halves, which are equal
        cos, sin = (table[..., : R // 2].repeat(1, 1, 2) for table in (cos, sin))
    tensors = {"q": q, "k": k}
    name = "apply_rotary_pos_emb" + ("_interleave" if options.get("split") else "")

    def ours(q, k):
        return rope(q, k, cos, sin, **options)

    function = getattr(modeling, name)

    def theirs(q, k):
        if "k" in inspect.signature(function).parameters:
            return function(q, k, cos, sin)
        return function(q, cos, sin), function(k, cos, sin)

    want, want_grads, seeds = run(theirs, tensors)
    got, got_grads, _ = run(ours, tensors, seeds)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    # The backward of these rounds both products of the sum, ours the sum.
    if model in ("olmo2", "deepseek_v4"):
        assert_matches(ours, theirs, tensors)
    else:
        torch.testing.assert_close(got_grads, want_grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama4", "apply_rotary_emb"),
        ("llama4", "vision_apply_rotary_emb"),
        ("deepseek_v2", "apply_rotary_emb"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_a_complex_table_rotate_as_the_table_does(model, name, dtype):
    function = getattr(
        importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name
    )
    length_first = model == "llama4"
    torch.manual_seed(0)
    q, k = (transposed(2, H, 3, 8, dtype, "cpu") for H in (4, 2))
    table = complex_table(1 if name.startswith("vision") else 2, 3, 8, "cpu")
    cos, sin = torch.view_as_real(table).unbind(-1)

    def ours(q, k):
        return rope(q, k, cos, sin, interleaved=True, narrow_table=True, keep_dtype=True)

    def theirs(q, k):
        if not length_first:
            return function(q, k, table)
        return tuple(
            x.transpose(1, 2) for x in function(q.transpose(1, 2), k.transpose(1, 2), table)
        )

    assert_matches(ours, theirs, {"q": q, "k": k})
