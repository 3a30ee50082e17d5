"""Tensors that can be made again: who reads them, changes them, or keeps what they came from."""

import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from alias import Alias
from census import kept_bytes
from torch.utils.checkpoint import checkpoint

from liger_trainer.kernels import recompute
from liger_trainer.kernels.layers.glu import geglu, swiglu
from liger_trainer.kernels.layers.layer_norm import layer_norm
from liger_trainer.kernels.layers.rms_norm import rms_norm
from liger_trainer.kernels.recompute import recomputable, recomputing


def outputs_of_kernels(x, weight, gate, up):
    return [
        rms_norm(x, weight, eps=1e-6),
        layer_norm(x, weight, weight, eps=1e-6),
        swiglu(gate, up),
        geglu(gate, up, approximate="tanh"),
    ]


def test_a_norm_that_reads_what_itself_has_made():
    """Its weight is met again below; the derivative of the upper call ends at that call's input."""
    gradients = []
    for scope in (recomputing, recompute.contextlib.nullcontext):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
        with scope():
            y = rms_norm(rms_norm(x, weight, eps=1e-6).tanh(), weight, eps=1e-6)
            y.square().mul(x).sum().backward()
        gradients.append((x.grad, weight.grad))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_same_bits_as_the_run_that_keeps_everything(kernel_device, autocast):
    torch.manual_seed(0)
    shapes = [(2, 3, 64), (64,), (2, 3, 96), (2, 3, 96), (32, 64), (16, 96)]
    tensors = [torch.randn(shape, device=kernel_device) for shape in shapes]
    results = []
    for scope in (recomputing, recompute.contextlib.nullcontext):
        x, weight, gate, up, reader, gated_reader = leaves = [
            t.clone().requires_grad_() for t in tensors
        ]
        with (
            scope(),
            torch.autocast(torch.device(kernel_device).type, torch.bfloat16, enabled=autocast),
        ):
            made = outputs_of_kernels(x, weight, gate, up)
            readers = [reader, reader, gated_reader, gated_reader]
            read = [F.linear(y, w).sum() for y, w in zip(made, readers, strict=True)]
            total = sum(read) + F.linear(made[0], reader).square().sum()
        total.backward()
        results.append([total.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def counted(calls: list):
    def double(x):
        calls.append(1)
        return x * 2.0

    return double


def marked(x, calls):
    """2 x, whose multiplication keeps nothing, as a tensor that can be made again."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = x * 2.0
    return recomputable(y, counted(calls), (x,))


def test_readers_share_one_computation_and_it_is_dropped_after_the_last():
    x, calls = torch.randn(4, 8, requires_grad=True), []
    weights = [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
    with recomputing():
        y = marked(x, calls)
        total = sum(F.linear(y, w).square().sum() for w in weights)
        recipe = recompute._marked_on(y.untyped_storage())
    assert recipe.readers == 3
    total.backward(retain_graph=True)
    assert len(calls) == 1
    assert recipe.value is None
    first = [w.grad.clone() for w in weights]
    total.backward()
    assert len(calls) == 2
    for w, once in zip(weights, first, strict=True):
        torch.testing.assert_close(w.grad, 2 * once)


@pytest.mark.parametrize("changed", [False, True])
def test_another_tensor_of_the_same_memory(changed):
    x, calls = torch.randn(4, 8, requires_grad=True), []
    w = torch.randn(3, 8, requires_grad=True)
    with recomputing():
        y = marked(x, calls)
        alias = Alias.apply(y)
        if changed:
            alias = alias.mul_(2.0)
        F.linear(alias, w).sum().backward()
    expected = (4.0 if changed else 2.0) * x.detach()
    torch.testing.assert_close(w.grad, expected.sum(0).expand(3, 8))
    torch.testing.assert_close(x.grad, (4.0 if changed else 2.0) * w.detach().sum(0).expand(4, 8))
    assert len(calls) == (not changed)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_kept_as_they_are(layout):
    matrix = torch.eye(4).to_sparse(layout=layout)
    x = torch.randn(4, 3, requires_grad=True)
    with recomputing():
        (matrix @ x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2.0 * x.detach())


def test_who_keeps_the_output_does_not_keep_its_sources():
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(3, 8, requires_grad=True)
    with recomputing():
        source = x * 1.0
        memory = weakref.ref(source.untyped_storage())
        y = recomputable(source * 2.0, lambda t: t * 2.0, (source,))
        loss = F.linear(y, w).sum()
    kept = y.detach()
    del source, y
    assert memory() is not None
    loss.backward()
    del loss
    assert memory() is None
    torch.testing.assert_close(kept, 2.0 * x.detach())


def test_who_keeps_an_output_that_nobody_saved_does_not_keep_the_graph():
    x = torch.randn(4, 8, requires_grad=True)
    with recomputing():
        source = x * 1.0
        memory = weakref.ref(source.untyped_storage())
        kept = marked(source, []).detach()
        del source
        assert memory() is not None  # it might still be saved
    assert memory() is None
    weight = torch.randn(3, 8, requires_grad=True)
    with recomputing():  # which does not know the recipe any more
        F.linear(kept, weight).sum().backward()
    torch.testing.assert_close(weight.grad, kept.sum(0).expand(3, 8))


def test_a_cast_that_lays_memory_out_anew():
    results = []
    for scope in (recomputing, recompute.contextlib.nullcontext):
        torch.manual_seed(0)
        x = torch.randn(4, 6, 8).transpose(0, 1).requires_grad_()
        w = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
        with scope():
            y = rms_norm(x, eps=1e-6)
            total = (y.to(torch.float64) @ w).sum()
            anew = y.to(torch.float64, memory_format=torch.contiguous_format)
            total = total + (anew @ w).square().sum()
        total.backward()
        results.append((x.grad, w.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_views_of_a_marked_tensor():
    x, calls = torch.randn(4, 8, requires_grad=True), []
    w = torch.randn(4, 4, requires_grad=True)
    with recomputing():
        y = marked(x, calls)
        product = (y.t()[2:6] * w).sum()  # transposed and cut
    product.backward()
    assert calls
    torch.testing.assert_close(w.grad, (2 * x).t()[2:6])


def test_in_place_change_of_the_input_is_refused():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    inner = x * 1.0
    with recomputing():
        total = F.linear(marked(inner, []), w).sum()
    with torch.no_grad():
        inner.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_place_change_of_a_tensor_that_is_kept_is_refused():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    inner = x * 1.0
    with recomputing():
        total = F.linear(inner, w).sum()
    with torch.no_grad():
        inner.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_place_change_of_the_output():
    """Before it is read: what is read counts. After: what was read counts, which is made again."""
    for change_first in (True, False):
        x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
        with recomputing():
            y = marked(x, [])
            if change_first:
                y.mul_(3.0)
            read = y.detach().clone()
            total = F.linear(y, w).sum()
            if not change_first:
                y.mul_(3.0)
        total.backward()
        torch.testing.assert_close(w.grad, torch.ones(3, 4) @ read)


def test_double_backward_on_the_torch_path():
    results = []
    for scope in (recomputing, recompute.contextlib.nullcontext):
        torch.manual_seed(0)
        x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
        with scope():
            total = F.linear(rms_norm(x, eps=1e-6), w).square().sum()
            (grad,) = torch.autograd.grad(total, x, create_graph=True)
            grad.square().sum().backward()
        results.append([x.grad, w.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_that_an_engine_frees_until_the_norm_s_own_backward():
    x, reader = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    full = weight.detach().clone()
    expected = torch.ones(3, 4) @ rms_norm(x, weight, eps=1e-6).detach()
    with recomputing():
        y = rms_norm(x, weight, eps=1e-6)
        total = F.linear(y, reader).sum()

    def gather(grad):
        weight.untyped_storage().resize_(full.untyped_storage().size())
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.copy_(full)

    y.register_hook(gather)
    del y
    weight.untyped_storage().resize_(0)
    total.backward()
    torch.testing.assert_close(reader.grad, expected)


def test_casts_of_a_marked_tensor_cost_nothing():
    x = torch.randn(64, 128, requires_grad=True)
    weights = [torch.randn(16, 128, requires_grad=True) for _ in range(3)]

    def forward():
        with recomputing(), torch.autocast("cpu", torch.bfloat16):
            y = rms_norm(x, eps=1e-6)
            return sum(F.linear(y, w).float().sum() for w in weights)

    weights_in_bf16 = 3 * 16 * 128 * 2
    assert kept_bytes(forward, x, *weights) <= weights_in_bf16 + 1024
    assert weights[0].grad is not None


def test_of_a_widened_tensor_the_16_bits_are_kept(every_size):
    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.randn(128, requires_grad=True)
    inner = x * 1.0

    def forward():
        with recomputing():
            return (inner.to(torch.float32) * scale).sum()

    assert kept_bytes(forward, x, scale, inner) == 64 * 128 * 2
    torch.testing.assert_close(scale.grad, x.detach().float().sum(0))


def test_hooks_of_others_inside():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def inner(x):
        return F.linear(rms_norm(x, eps=1e-6), w)

    with recomputing():
        total = checkpoint(inner, rms_norm(x, eps=1e-6), use_reentrant=False).square().sum()
    grads = torch.autograd.grad(total, (x, w))
    plain = inner(rms_norm(x, eps=1e-6)).square().sum()
    for a, b in zip(grads, torch.autograd.grad(plain, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_forward_that_calls_torch_func_hears_what_to_switch_off():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="set activation_memory to keep"), recomputing():
        torch.func.grad(lambda t: t.sin().sum())(x)
    with recomputing():  # nothing is left of it
        y = rms_norm(x, eps=1e-6)
    y.sum().backward()


def test_marked_tensors_are_saved_to_files():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with recomputing():
        y = rms_norm(x, eps=1e-6)
        F.linear(y, w)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), y)
