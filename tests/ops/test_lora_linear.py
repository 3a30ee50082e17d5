"""A linear layer and its adapters as one operation: values, every gradient, and dropout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches, run

from liger_trainer.kernels.layers import lora_linear as kernel
from liger_trainer.kernels.layers import lora_products as products
from liger_trainer.kernels.layers.lora_in_parts import _BLOCK, _gather_parts_kernel, split_pair
from liger_trainer.kernels.layers.lora_linear import Adapter, add_adapters, lora_linear

bf16, fp32 = torch.bfloat16, torch.float32


def operands(device, dtype, adapter_dtype, rows=(3, 17), width=48, out=40, rank=5):
    torch.manual_seed(0)
    shapes = {
        "x": (*rows, width), "weight": (out, width), "bias": (out,),
        "A": (rank, width), "B": (out, rank), "A2": (3, width), "B2": (out, 3),
    }  # fmt: skip
    return {
        name: (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(
            adapter_dtype if name[0] in "AB" else dtype
        )
        for name, shape in shapes.items()
    }


def two_adapters(function):
    def called(x, weight, bias, A, B, A2, B2):
        return function(x, weight, bias, [Adapter(A, B, 0.7), Adapter(A2, B2, 1.5)])

    return called


def around(x, weight, bias, adapters):
    return add_adapters(F.linear(x, weight, bias), x, adapters)


@pytest.mark.parametrize("function", [lora_linear, around])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (fp32, fp32),
        (bf16, bf16),
        (bf16, fp32),
        (torch.float16, torch.float16),
        (torch.float16, fp32),
    ],
)
def test_as_exact_as_peft_s_formula(kernel_device, function, dtype, adapter_dtype):
    assert_matches(
        two_adapters(function),
        two_adapters(kernel.lora_linear_reference),
        operands(kernel_device, dtype, adapter_dtype),
    )


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("adapter_dtype", [bf16, fp32])
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": (70,), "width": 600, "out": 300, "rank": 40},  # several blocks of everything
        {"rows": (580,), "width": 520, "out": 20, "rank": 16},  # several sums of everything
        {"rows": (1,), "width": 1, "out": 1, "rank": 1},
    ],
)
def test_of_any_shape(kernel_device, monkeypatch, shape, adapter_dtype, large):
    monkeypatch.setattr(products, "_LARGE", 0 if large else float("inf"))
    assert_matches(
        two_adapters(lora_linear),
        two_adapters(kernel.lora_linear_reference),
        operands(kernel_device, bf16, adapter_dtype, **shape),
        factor=16.0 if large else 4.0,  # tensor cores drop bits when they add up many products
    )


def test_scale_by_a_number_of_numpy(kernel_device):
    tensors = operands(kernel_device, bf16, fp32)
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "A", "B"))
    given = [lora_linear(x, weight, None, [Adapter(A, B, s)]) for s in (0.5, np.float64(0.5))]
    assert torch.equal(*given)


@pytest.mark.parametrize("with_bias", [True, False])
def test_no_adapters(kernel_device, with_bias):
    tensors = operands(kernel_device, bf16, fp32)
    operands_of_base = {name: tensors[name] for name in ("x", "weight", "bias")[: 2 + with_bias]}
    assert_matches(
        lambda x, weight, bias=None: lora_linear(x, weight, bias, []), F.linear, operands_of_base
    )
    x = tensors["x"].detach().requires_grad_()
    y = kernel.add_adapters(x.detach(), x, [])
    assert torch.equal(y, x)
    y.sum().backward()
    assert not x.grad.any()


def test_a_weight_of_another_dtype_is_refused(device):
    tensors = operands(device, bf16, fp32)
    adapters = [Adapter(tensors["A"], tensors["B"], 0.5)]
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    for wrong in ((weight.float(), bias), (weight, bias.float())):
        with pytest.raises(ValueError, match=r"must be torch\.bfloat16"):
            lora_linear(x, *wrong, adapters)
    with torch.autocast(x.device.type, bf16):
        assert lora_linear(x, weight.float(), bias, adapters).dtype == bf16


def test_autocast_does_not_cast_fp64(device):
    tensors = operands(device, torch.float64, torch.float64)
    adapters = [Adapter(tensors["A"], tensors["B"], 0.5)]
    given = *(tensors[name] for name in ("x", "weight", "bias")), adapters
    with torch.autocast(device, bf16):
        found = lora_linear(*given)
    assert torch.equal(found, lora_linear(*given))


def test_no_rows(kernel_device):
    tensors = operands(kernel_device, bf16, fp32, rows=(2, 0))
    outputs, grads, _ = run(two_adapters(lora_linear), tensors)
    assert outputs[0].shape == (2, 0, 40)
    assert not any(grads[name].any() for name in ("A", "B", "weight"))


def test_three_parts_hold_every_bit(kernel_device):
    matrix = torch.randn(5, 70, device=kernel_device) * torch.logspace(-6, 6, 70).to(kernel_device)
    other = torch.randn(33, 5, device=kernel_device)
    first, second = split_pair(matrix, other.t())
    parts = first.double().view(3, 5, 70).sum(0)
    torch.testing.assert_close(parts, matrix.double(), rtol=2**-24, atol=0)
    columns = second.double().view(4, 5, 33)
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(columns[0], columns[2])
    torch.testing.assert_close(columns[0] + columns[3], other.double().t(), rtol=2**-15, atol=0)


@pytest.mark.parametrize("adapter_dtype", [bf16, fp32])
def test_dropout_is_its_mask(device, monkeypatch, adapter_dtype):
    monkeypatch.setattr(kernel, "_draw_seed", lambda: 7)
    tensors = operands(device, bf16, adapter_dtype)
    del tensors["A2"], tensors["B2"]
    keep = kernel.dropout_mask(tensors["x"], 7, 0.3)
    assert 0 < keep.sum() < keep.numel()
    assert_matches(
        lambda x, weight, bias, A, B: lora_linear(x, weight, bias, [Adapter(A, B, 0.7, 0.3)]),
        lambda x, weight, bias, A, B: kernel.lora_linear_reference(
            x, weight, bias, [Adapter(A, B, 0.7, 0.3)], keeps=[keep]
        ),
        tensors,
    )


def test_dropout_of_everything(device):
    """As `nn.Dropout(1.0)`: only the base layer is left, and the adapter's gradients are 0."""
    made = operands(device, fp32, fp32)
    names = ("x", "weight", "bias", "A", "B")
    x, weight, bias, A, B = (made[name].requires_grad_() for name in names)
    y = lora_linear(x, weight, bias, [Adapter(A, B, 0.7, 1.0)])
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    y.square().sum().backward()
    assert not A.grad.any()
    assert not B.grad.any()


def test_more_elements_than_an_int32_holds(kernel_device):
    """The first of the programs that a sum of 2^31 elements takes, all of which it has to write."""
    rows, rank, scale = 1 << 27, 16, 2.0
    sums = torch.ones(_BLOCK // rank, 3 * rank, device=kernel_device)
    h = torch.zeros(_BLOCK // rank, rank, device=kernel_device)
    parts = torch.zeros(_BLOCK // rank, 4 * rank, device=kernel_device, dtype=bf16)
    _gather_parts_kernel[(1,)](sums, h, parts, scale, rows, rank, 3, _BLOCK)
    assert (h == 6.0).all()


def test_dropout_masks_are_fair_and_follow_the_seed(device):
    x = torch.empty(200, 500, device=device)
    one, again, other = (kernel.dropout_mask(x, seed, 0.25) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert abs(one.float().mean().item() - 0.75) < 0.01
    assert abs((one == other).float().mean().item() - (0.75**2 + 0.25**2)) < 0.01
    torch.manual_seed(3)
    drawn = [kernel._draw_seed() for _ in range(2)]
    torch.manual_seed(3)
    assert [kernel._draw_seed() for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]
