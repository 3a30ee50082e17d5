"""Rotary functions that take cosine and sine as one complex table."""

import pytest
import torch
from rotary_calls import CALLS, attention, states
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb as deepseek_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss_rotary
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb as llama4_rotary
from transformers.models.llama4.modeling_llama4 import (
    vision_apply_rotary_emb as llama4_vision_rotary,
)

pytestmark = pytest.mark.usefixtures("every_size")


def back(x, freqs_cis):
    """As DeepSeek's own code undoes a rotation, and of one state."""
    return deepseek_rotary(x, x, freqs_cis.conj())[0]


def halves_by_complex_numbers(freqs_cis, q, k):
    def rotate(x):
        y = torch.complex(*x.float().chunk(2, -1)) * freqs_cis[:, None]
        return torch.cat([y.real, y.imag], -1).to(x.dtype)

    return rotate(q), rotate(k)


q, k, cos, sin = states()
q2, k2, _, _ = states(heads=2)
cis = torch.complex(cos, sin)[..., :8]
one_cis = cis[0, :, None]  # [S, 1, R / 2], as a vision tower has it


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "fused"),
    [
        (llama4_rotary, (q2, k2, cis), {}, True),
        (llama4_rotary, (q2, k2, cis[:1]), {}, True),
        (llama4_rotary, (q2.bfloat16(), k2), {"freqs_cis": cis}, True),
        (llama4_rotary, (q2, k2, cis.conj()), {}, True),
        (llama4_rotary, (q2, k2, cis[..., :1]), {}, False),  # a broadcast over pairs
        (llama4_rotary, (q2, k2, cis[:, :1]), {}, False),  # and over length
        (llama4_rotary, (q2, k2, cis.real), {}, False),  # as a cast to a real dtype leaves it
        (llama4_vision_rotary, (q2, k2), {"freqs_ci": one_cis}, True),
        (llama4_vision_rotary, (q2.half(), k2.half(), one_cis), {}, True),
        (llama4_vision_rotary, (q2, k2, cis[:1]), {}, False),
        (deepseek_rotary, (q, k[:, :1], cis), {}, True),
        (deepseek_rotary, (), {"xk": k, "freqs_cis": cis[:1], "xq": q}, True),
        (back, (q, cis), {}, True),
        (halves_by_complex_numbers, (cis, q, k), {}, True),
    ],
)
def test_every_call_gives_what_the_original_gives(function, args, kwargs, fused):
    module, report = attention(function)
    assert report.coverage["rope"] == (1, 1)
    expected, got = function(*args, **kwargs), module(*args, **kwargs)
    assert (not CALLS) == fused
    torch.testing.assert_close(got, expected)


def test_gradients_of_a_learned_table():
    module, _ = attention(llama4_rotary)
    leaves = [x.clone().requires_grad_() for x in (q2, k2, cis)]
    seeds = [torch.randn_like(x) for x in (q2, k2)]
    got, want = (
        torch.autograd.grad(function(*leaves), leaves, seeds)
        for function in (module, llama4_rotary)
    )
    assert not CALLS
    torch.testing.assert_close(got, want)


def of_length_one(q, k, freqs_cis):
    return deepseek_rotary(q, k, freqs_cis / freqs_cis.abs())


def turned_twice(q, k, freqs_cis):
    return deepseek_rotary(q, k, freqs_cis.square())


def mirrored(q, k, freqs_cis):
    """The conjugates of the pairs, instead of the table's."""
    return tuple(
        torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2))).conj() * freqs_cis[:, None]
        ).flatten(3)
        for x in (q, k)
    )


def of_matrices(q, k, freqs_cis):
    """The table holds cos and sin in a dimension of its own."""
    cos, sin = freqs_cis[..., 0], freqs_cis[..., 1]
    return gpt_oss_rotary(q, k, cos, sin)


@pytest.mark.parametrize("function", [of_length_one, turned_twice, mirrored, of_matrices])
def test_other_functions_of_a_complex_table_are_refused(function):
    _, report = attention(function)
    assert report.coverage["rope"] == (0, 1)
