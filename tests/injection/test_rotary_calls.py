"""A swapped rotary function, called in every way that the original can be."""

import copy

import pytest
import torch
import transformers
from families import batch, tiny_model
from packaging.version import Version
from rotary_calls import CALLS, attention, counted, states
from torch import nn
from transformers.models.codegen.modeling_codegen import apply_rotary_pos_emb as codegen_rotary
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.gemma3n.modeling_gemma3n import apply_rotary_pos_emb as gemma_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from liger_trainer import inject
from liger_trainer.report import InjectionReport, Status

pytestmark = pytest.mark.usefixtures("every_size")


def other_names(query, key, cosine, sine, dim=1):
    return llama_rotary(query, key, cosine, sine, dim)


def tables_first(cos, sin, q, k):
    return llama_rotary(q, k, cos, sin)


def heads_after_length(q, k, cos, sin, unsqueeze_dim=2):
    return llama_rotary(q, k, cos, sin, unsqueeze_dim)


def queries_alone(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    if k is None:
        return llama_rotary(q, q, cos, sin, unsqueeze_dim)[0]
    return llama_rotary(q, k, cos, sin, unsqueeze_dim)


def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    if position_ids is not None:
        cos, sin = cos[:, position_ids], sin[:, position_ids]
    return llama_rotary(q, k, cos, sin, unsqueeze_dim)


def only_heads_first(q, k, cos, sin, unsqueeze_dim=1):
    if unsqueeze_dim == 2:
        return q, k
    return llama_rotary(q, k, cos, sin)


def rotates_nothing(q, k, cos, sin):
    return rotate_half(q), k


def neighbors_apart(q, k, cos, sin):
    """As DeepSeek's, which broadcasts a table of two columns over all channels."""
    cos, sin = (table[:, None, :, : table.shape[-1] // 2] for table in (cos, sin))

    def rotate(x):
        first, second = x[..., ::2], x[..., 1::2]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return rotate(q), rotate(k)


def last_channels(x, cos, sin, unsqueeze_dim=1):
    """As DeepSeek V4's, which rotates neighbors in the last channels of a head."""
    cos, sin = (t.repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for t in (cos, sin))
    passed, pairs = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :].float()
    partner = torch.stack([-pairs[..., 1::2], pairs[..., ::2]], -1).flatten(-2)
    return torch.cat([passed, (pairs * cos + partner * sin).to(x.dtype)], -1)


def tables_first_of_one(sin, cos, x):
    return gemma_rotary(x, cos, sin)


def without_batch(q, k, cos, sin):
    """As a vision tower calls it: the patches of all images in one row."""
    return apply_rotary_pos_emb_vision(q, k, cos, sin)


q, k, cos, sin = states()
q2, k2, _, _ = states(heads=2)
half = cos[..., :8], sin[..., :8]
quarter = cos[..., :4], sin[..., :4]


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "fused"),
    [
        (llama_rotary, (q, k, cos, sin), {}, True),
        (llama_rotary, (q, k, cos, sin, 1), {}, True),
        (llama_rotary, (q2, k2, cos, sin, 2), {}, True),
        (llama_rotary, (q2, k2, cos, sin), {"unsqueeze_dim": 2}, True),
        (llama_rotary, (q, k), {"sin": sin, "cos": cos}, True),
        (llama_rotary, (), {"k": k, "q": q, "sin": sin, "cos": cos}, True),
        (llama_rotary, (q, k, cos, sin), {"unsqueeze_dim": -3}, False),
        (llama_rotary, (q[0], k[0], cos[:1], sin[:1]), {}, False),
        (llama_rotary, (q[:, :, :1], k[:, :, :1], cos, sin), {}, False),  # a broadcast over length
        (other_names, (q, k, cos, sin), {}, True),
        (other_names, (q2, k2), {"sine": sin, "cosine": cos, "dim": 2}, True),
        (tables_first, (cos, sin, q, k), {}, True),
        (heads_after_length, (q2, k2, cos, sin), {}, True),
        (heads_after_length, (q, k, cos, sin, 1), {}, True),
        (queries_alone, (q,), {"cos": cos, "sin": sin}, False),
        (queries_alone, (q, None, cos, sin), {}, False),
        (queries_alone, (q, k), {"cos": cos, "sin": sin}, True),
        (with_positions, (q, k, cos, sin), {}, True),
        (with_positions, (q, k, cos, sin, torch.arange(5).flip(0)), {}, False),
        (with_positions, (q, k, cos, sin), {"position_ids": torch.arange(5).flip(0)}, False),
        (with_positions, (q2, k2, cos, sin, None, 2), {}, False),
        (apply_rotary_pos_emb_interleave, (q, k, cos, sin), {}, True),
        (apply_rotary_pos_emb_interleave, (q2, k2, cos, sin), {"unsqueeze_dim": 2}, True),
        (neighbors_apart, (q, k, cos, sin), {}, True),
        (neighbors_apart, (q, k, cos[..., :2], sin[..., :2]), {}, False),
        (gpt_oss_rotary, (q, k, *half), {}, True),
        (gpt_oss_rotary, (q, k, cos[..., :1], sin[..., :1]), {}, False),  # a broadcast, too
        (without_batch, (q2[0], k2[0], cos[0], sin[0]), {}, True),
        (without_batch, (q2, k2, cos, sin), {}, True),
        (without_batch, (q2, k2, cos[0], sin[0]), {}, False),  # one table for all
        (gemma_rotary, (q, cos, sin), {}, True),
        (gemma_rotary, (q.bfloat16(), cos, sin), {}, True),
        (gemma_rotary, (q2, cos, sin, 2), {}, True),
        (gemma_rotary, (), {"sin": sin, "unsqueeze_dim": 2, "cos": cos, "x": k2}, True),
        (gemma_rotary, (q, cos[:1], sin[:1]), {}, True),
        (gemma_rotary, (q[0], cos, sin), {}, False),  # no batch
        (gemma_rotary, (q[:, 0], cos, sin, 0), {}, False),  # no heads
        (gemma_rotary, (q[:, :, :1], cos, sin), {}, False),  # a broadcast over length
        (last_channels, (q, *half), {}, True),
        (last_channels, (q, *quarter), {}, True),
        (last_channels, (q2, *quarter, 2), {}, True),
        (codegen_rotary, (q2, *half), {}, True),
        (codegen_rotary, (q2[..., :8], *quarter), {}, True),
        (codegen_rotary, (q2.transpose(1, 2)[:, :5, :4], half[0][:, :4], half[1][:, :4]), {}, True),
        (tables_first_of_one, (cos, sin, q), {}, True),
        (only_heads_first, (q, k, cos, sin), {}, True),
        (only_heads_first, (q, k, cos, sin, 2), {}, False),
    ],
)
def test_every_call_gives_what_the_original_gives(function, args, kwargs, fused):
    module, report = attention(function)
    assert report.coverage["rope"] == (1, 1)
    expected, got = function(*args, **kwargs), module(*args, **kwargs)
    assert (not CALLS) == fused
    assert isinstance(got, tuple) == isinstance(expected, tuple)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((q, k, cos), {}), ((q, k, cos, sin, 1, 1), {}), ((q, k, cos, sin), {"q": q}),
     ((q, k, cos, sin), {"scale": 2})],
)  # fmt: skip
def test_a_wrong_call_raises_as_the_original_does(args, kwargs):
    module, _ = attention(llama_rotary)
    with pytest.raises(TypeError, match="apply_rotary_pos_emb"):
        module(*args, **kwargs)


def either(first, second) -> tuple[nn.Module, InjectionReport]:
    """A swapped module that calls one function or the other, as its configuration says."""
    scope = {"first": counted(first), "second": counted(second)}
    code = "def forward(self, *args, other):\n    return (second if other else first)(*args)"
    exec(code, scope)
    model = nn.Sequential(type("Attention", (nn.Module,), {"forward": scope["forward"]})())
    report = inject(model)
    CALLS.clear()
    return model[0], report


@pytest.mark.parametrize("other", [False, True])
def test_whichever_function_a_forward_calls_is_swapped(other):
    module, report = either(llama_rotary, apply_rotary_pos_emb_interleave)
    assert report.coverage["rope"] == (1, 1)
    expected = (apply_rotary_pos_emb_interleave if other else llama_rotary)(q, k, cos, sin)
    got = module(q, k, cos, sin, other=other)
    assert not CALLS
    torch.testing.assert_close(got, expected)


def test_a_forward_that_may_call_an_unknown_function_is_refused():
    _, report = either(llama_rotary, rotates_nothing)
    assert report.coverage["rope"] == (0, 1)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_function_that_rotates_a_part_of_the_channels_by_each_axis(heads):
    """As Gemma 4's vision tower has it: the function inside is swapped, for this model alone."""
    scope = {"rotary": counted(gemma_rotary), "torch": torch}
    exec(
        "def by_axes(x, cos, sin, positions, unsqueeze_dim=2):\n"
        "    parts = [t.chunk(positions.shape[-1], -1) for t in (x, cos, sin)]\n"
        "    return torch.cat([rotary(*part, unsqueeze_dim) for part in zip(*parts)], -1)\n"
        "def forward(self, *args):\n"
        "    return by_axes(*args)",
        scope,
    )
    model = nn.Sequential(type("Attention", (nn.Module,), {"forward": scope["forward"]})())
    report = inject(model)
    assert report.coverage["rope"] == (1, 1)
    args = (states(heads)[0], cos, sin, torch.zeros(2, 5, 2), heads)
    expected = scope["by_axes"](*args)
    CALLS.clear()
    torch.testing.assert_close(model[0](*args), expected)
    assert not CALLS


def one_in_a_list(x, cos, sin):
    return [gemma_rotary(x, cos, sin)]


def one_in_place(x, cos, sin):
    return x.mul_(cos[:, None])


def two_in_a_list(q, k, cos, sin):
    return list(llama_rotary(q, k, cos, sin))


def with_norms(q, k, cos, sin):
    return *llama_rotary(q, k, cos, sin), q.norm(dim=-1)


def never_pleased(q, k, cos, sin):
    raise AttributeError("no tensor of mine")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (with_norms, "returns 3 tensors"),
        (never_pleased, "no tensor of mine"),
        (one_in_a_list, "returns a list for 1 states"),
        (two_in_a_list, "returns a list for 2 states"),
        (one_in_place, "in-place"),
    ],
)
def test_a_function_of_another_kind_is_refused(function, reason):
    _, report = attention(function)
    (row,) = [row for row in report.rows if row.rule == "rope"]
    assert not row.swapped
    assert reason in row.reason


def of_three(q, k, v, cos, sin):
    return q * cos[:, None], k * sin[:, None], v


def and_positions(x, cos, sin, positions):
    return x * cos[:, positions] + rotate_half(x) * sin[:, positions]


@pytest.mark.parametrize("function", [of_three, and_positions])
def test_the_rule_does_not_apply_to_a_function_of_other_arguments(function):
    _, report = attention(function)
    assert report.coverage["rope"] == (0, 0)
    (row,) = [row for row in report.rows if row.rule == "rope"]
    assert row.status is Status.NOT_APPLICABLE
    assert row.reason.endswith("other arguments than one or two states, cosine and sine")


def test_a_function_that_rotates_nothing_is_refused():
    _, report = attention(rotates_nothing)
    assert report.coverage["rope"] == (0, 1)


INDEXED = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "indexed_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


def test_a_model_that_rotates_queries_alone_trains():
    """Its indexer leaves the keys out."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers has no such indexer yet")
    model = tiny_model("qwen4_exp_text", **INDEXED)
    plain = copy.deepcopy(model)
    assert inject(model).coverage["rope"] == (2, 2)
    losses = [each(**batch()).loss for each in (model, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
