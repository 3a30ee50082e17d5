"""Attention by the bounds of documents: the mask's result, without the mask."""

import pytest
import torch
from oracle import assert_matches
from packed import positions

from liger_trainer.kernels.layers.packed_attention import (
    dense_mask,
    documents_of,
    has_kernel,
    one_per_row,
    packed_attention,
    packed_attention_reference,
)


def test_documents_end_where_positions_do_not_go_on(device):
    documents = documents_of(positions((3, 2, 1), (6,), device=device))
    assert documents.bounds.tolist() == [0, 3, 5, 6, 12]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == 6
    gap = torch.tensor([[4, 5, 6, 9, 10, 10]], device=device)
    assert documents_of(gap).bounds.tolist() == [0, 3, 5, 6]
    assert documents_of(torch.zeros(3, 1, dtype=torch.long)).bounds.tolist() == [0, 1, 2, 3]


def test_one_document_per_row(device):
    documents = one_per_row(3, 5, torch.device(device))
    assert documents.bounds.tolist() == [0, 5, 10, 15]
    assert documents.longest == 5


@pytest.mark.parametrize("window", [None, 1, 2, 4, 50])
def test_mask_is_what_it_says(window):
    rows = [(3, 2, 1), (1, 5)]
    mask = dense_mask(documents_of(positions(*rows)), 2, window)
    for b, row in enumerate(rows):
        document = [n for n, length in enumerate(row) for _ in range(length)]
        for i in range(6):
            for j in range(6):
                seen = document[i] == document[j] and 0 <= i - j < (window or 6)
                assert mask[b, 0, i, j] == seen, (b, i, j)


def tensors(heads, kv_heads, length, size, device, dtype):
    make = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: torch.randn(2, length, n, size, device=device, dtype=dtype).transpose(1, 2)
        for name, n in make.items()
    }


SHAPES = [
    (4, 2, 300, 64, None),
    (4, 4, 300, 128, 100),
    (8, 1, 257, 128, None),
    (6, 2, 130, 80, 1),
    (2, 1, 200, 256, 64),
    (4, 2, 64, 40, 1000),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "size", "window"), SHAPES)
def test_kernel_matches_the_mask(heads, kv_heads, length, size, window, dtype):
    inputs = tensors(heads, kv_heads, length, size, "cuda", dtype)
    assert has_kernel(*inputs.values())
    cuts = positions((1, length // 3, length - 1 - length // 3), (length,), device="cuda")
    options = {"documents": documents_of(cuts), "window": window, "scale": 0.2}
    assert_matches(
        lambda q, k, v: packed_attention(q, k, v, **options),
        lambda q, k, v: packed_attention_reference(q, k, v, **options),
        inputs,
    )


@pytest.mark.gpu
def test_kernel_takes_packed_projections_and_hands_out_what_the_next_layer_views():
    """q, k and v are slices of one projection; nothing of T x T is allocated."""
    qkv = torch.randn(2, 4096, 12, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.split([8, 2, 2], dim=2))
    documents = one_per_row(2, 4096, qkv.device)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = packed_attention(q, k, v, documents)
    assert torch.cuda.max_memory_allocated() - before < 4 * q.numel() * 2
    assert out.shape == (2, 4096, 8, 64)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torch_path_keeps_documents_apart(dtype):
    """Each document gets what it would get alone."""
    inputs = tensors(4, 2, 12, 16, "cpu", dtype)
    out = packed_attention(**inputs, documents=documents_of(positions((5, 7), (4, 8))), scale=0.3)
    assert out.shape == (2, 12, 4, 16)
    for row, start, end in [(0, 0, 5), (0, 5, 12), (1, 0, 4), (1, 4, 12)]:
        q, k, v = (x[row : row + 1, :, start:end] for x in inputs.values())
        alone = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[row : row + 1, start:end], alone.transpose(1, 2))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = tensors(4, 2, 6, 16, "cpu", torch.float32).values()
    documents = one_per_row(2, 6, q.device)
    for bad in [(q[:, :3], k, v), (q, k[..., :8], v), (q, k, v[:, :, :3]), (q[:1], k, v)]:
        with pytest.raises(ValueError, match="packed_attention: q must be"):
            packed_attention(*bad, documents)
