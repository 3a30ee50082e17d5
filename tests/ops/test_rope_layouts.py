"""Rotary embedding: memory layouts of inputs, tables, outputs and gradients."""

import pytest
import torch
from oracle import assert_matches
from rotary_inputs import assert_rope_matches, complex_table, random_tables, transposed

from liger_trainer.kernels.layers.rope import rope, rope_reference


def test_one_table_is_shared_by_the_batch(kernel_device):
    q = transposed(3, 2, 4, 8, torch.float32, kernel_device)
    k = transposed(3, 1, 4, 8, torch.float32, kernel_device)
    cos, sin = random_tables(1, 4, 8, torch.float32, kernel_device)
    assert_rope_matches(q, k, cos, sin)
    assert_rope_matches(q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))


@pytest.mark.parametrize("layout", ["heads_inner", "sequence_inner"])
def test_outputs_and_gradients_keep_the_memory_order_of_q(kernel_device, layout):
    q = transposed(2, 4, 3, 8, torch.bfloat16, kernel_device)
    k = transposed(2, 2, 3, 8, torch.bfloat16, kernel_device)
    if layout == "sequence_inner":
        q, k = q.contiguous(), k.contiguous()
    tables = random_tables(2, 3, 8, torch.bfloat16, kernel_device)
    assert_rope_matches(q, k, *tables)
    q.requires_grad_(), k.requires_grad_()
    q_out, k_out = rope(q, k, *tables)
    grads = torch.autograd.grad(
        (q_out, k_out), (q, k), [torch.randn(x.shape).to(x) for x in (q_out, k_out)]
    )
    for got in ((q_out, k_out), grads):
        assert [g.stride() for g in got] == [q.stride(), k.stride()]


def test_q_and_k_may_be_slices_of_one_projection(kernel_device):
    cos, sin = random_tables(2, 3, 8, torch.float32, kernel_device)

    def of(fn):
        def call(qkv):
            q, k, _ = qkv.split([4 * 8, 2 * 8, 2 * 8], dim=-1)
            q, k = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k))
            return fn(q, k, cos, sin)

        return call

    qkv = torch.randn(2, 3, 8 * 8, device=kernel_device)
    assert_matches(of(rope), of(rope_reference), {"qkv": qkv})


def test_inputs_and_tables_without_unit_stride(kernel_device):
    q = torch.randn(2, 3, 2, 8, 2, device=kernel_device)[..., 0]
    k = torch.randn(2, 8, 2, 3, device=kernel_device).permute(0, 3, 2, 1)
    cos, sin = torch.randn(2, 2, 8, 2, device=kernel_device).unbind(-1)
    assert_rope_matches(q, k, cos, sin)
    torch.testing.assert_close(rope(q, k, cos, sin), rope_reference(q, k, cos, sin))


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("interleaved", [True, False])
def test_narrow_tables_that_are_the_parts_of_a_complex_one(kernel_device, tables, interleaved):
    """They are read where they lie: no copies are made."""
    q = transposed(2, 3, 4, 14, torch.bfloat16, kernel_device)
    k = transposed(2, 1, 4, 14, torch.bfloat16, kernel_device)
    cos, sin = torch.view_as_real(complex_table(tables, 4, 12, kernel_device)).unbind(-1)
    options = {"interleaved": interleaved, "narrow_table": True, "keep_dtype": True}
    assert_rope_matches(q, k, cos, sin, **options)
    copies = cos.contiguous(), sin.contiguous()
    assert all(map(torch.equal, rope(q, k, cos, sin, **options), rope(q, k, *copies, **options)))


@pytest.mark.parametrize("reduce", [torch.sum, lambda x: x.sum(1).square().sum()])
def test_gradients_arriving_expanded(kernel_device, reduce):
    cos, sin = random_tables(2, 3, 8, torch.float32, kernel_device)
    q = transposed(2, 4, 3, 8, torch.float32, kernel_device)
    k = transposed(2, 2, 3, 8, torch.float32, kernel_device)
    grads = []
    for fn in (rope, rope_reference):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
        sum(reduce(y) for y in fn(*leaves, cos, sin)).backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_inner", [True, False])
def test_offsets_above_two_to_the_31(heads_inner):
    """The last positions and heads, in both memory orders, forward and backward."""
    torch.manual_seed(0)
    H, D = 32, 128
    S = 2**31 // (H * D) + 3
    shape = (1, S, H, D) if heads_inner else (1, H, S, D)
    q = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q = (q.transpose(1, 2) if heads_inner else q).requires_grad_()
    k = transposed(1, 1, S, D, torch.bfloat16, "cuda")
    cos, sin = random_tables(1, S, D, torch.bfloat16, "cuda")
    q_out, _ = rope(q, k, cos, sin)
    (dq,) = torch.autograd.grad(q_out, q, q_out.detach())
    for part in (slice(0, 2), slice(S - 4, S)):
        few = q.detach()[:, :, part].double().requires_grad_()
        want, _ = rope_reference(few, few, cos[:, part].double(), sin[:, part].double())
        torch.testing.assert_close(q_out[:, :, part].double(), want, rtol=2**-8, atol=1e-4)
        (want_dq,) = torch.autograd.grad(want, few, q_out.detach()[:, :, part].double())
        torch.testing.assert_close(dq[:, :, part].double(), want_dq, rtol=2**-8, atol=1e-4)
