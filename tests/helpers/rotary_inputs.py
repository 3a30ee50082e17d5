"""Inputs for tests of the rotary embedding, and their comparison with torch."""

import torch
from oracle import assert_matches

from liger_trainer.kernels.layers.rope import rope, rope_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transposed(B, H, S, D, dtype, device):
    """As attention makes it: [B, H, S, D], a view of [B, S, H, D]."""
    return torch.randn(B, S, H, D, dtype=dtype, device=device).transpose(1, 2)


def random_tables(B, S, R, dtype, device, narrow_table=False):
    """No symmetry between the two halves, so that a wrong layout or transpose shows."""
    width = R // 2 if narrow_table else R
    # Cut from wider ones: a wrong width shows, too.
    return torch.randn(2, B, S, width + 1, dtype=dtype, device=device)[..., :width].unbind(0)


def complex_table(B, S, R, device):
    """As Llama 4 and DeepSeek V2 make it: cos + i sin, scaled."""
    return torch.complex(*random_tables(B, S, R, torch.float32, device, narrow_table=True))


def assert_rope_matches(q, k, cos, sin, **options):
    assert_matches(
        lambda q, k: rope(q, k, cos, sin, **options),
        lambda q, k: rope_reference(q, k, cos, sin, **options),
        {"q": q, "k": k},
    )
