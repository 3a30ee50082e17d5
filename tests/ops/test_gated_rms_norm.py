"""RMSNorm with a gate, against its formula in fp64."""

import functools
import itertools

import pytest
import torch
from oracle import assert_matches
from strides import views_of_x

from liger_trainer.kernels.layers.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference

OPTIONS = [
    {"gate_first": gate_first, "cast_first": cast_first, "activation": activation}
    for gate_first, cast_first, activation in itertools.product(
        (False, True), (False, True), ("silu", "sigmoid")
    )
]


def tensors(device, shape, dtype=torch.float32, weight_dtype=None, gate_dtype=None):
    x, gate, weight = torch.randn(shape), torch.randn(shape), 1 + torch.randn(shape[-1])
    return {
        "x": x.to(device, dtype),
        "gate": gate.to(device, gate_dtype or dtype),
        "weight": weight.to(device, weight_dtype or dtype),
    }


def check(inputs, **options):
    options = {"eps": 1e-6, **options}
    assert_matches(
        functools.partial(gated_rms_norm, **options),
        functools.partial(gated_rms_norm_reference, **options),
        inputs,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2,
     (torch.bfloat16, torch.float32)],
)  # fmt: skip
def test_every_form_in_every_dtype(kernel_device, options, dtype, weight_dtype):
    check(tensors(kernel_device, (3, 5, 48), dtype, weight_dtype), **options)
    check(tensors(kernel_device, (7, 48), dtype, weight_dtype), group_size=16, **options)


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (129, 33), (2, 700), (0, 8), (9, 4100)])
@pytest.mark.parametrize("gate_first", [True, False])
def test_odd_sizes(kernel_device, shape, gate_first):
    check(tensors(kernel_device, shape), gate_first=gate_first)


@pytest.mark.parametrize("group_size", [1, 3, 20, 60])
def test_groups(kernel_device, group_size):
    for gate_first in (True, False):
        check(tensors(kernel_device, (70, 60)), group_size=group_size, gate_first=gate_first)


@views_of_x
def test_strides(kernel_device, view):
    packed = torch.randn(3, 5, 96, device=kernel_device)
    x, gate = view(packed), view(torch.randn_like(packed))
    weight = torch.randn(x.shape[-1], device=kernel_device)
    check({"x": x, "gate": gate, "weight": weight})


def test_a_gate_of_another_dtype(kernel_device):
    check(tensors(kernel_device, (4, 32), torch.bfloat16, gate_dtype=torch.float32))


def test_magnitudes(kernel_device):
    for scale in (1e-4, 1e3):
        inputs = tensors(kernel_device, (4, 32))
        check({**inputs, "x": inputs["x"] * scale, "gate": inputs["gate"] * 10}, eps=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives(kernel_device, options):
    inputs = {n: t.requires_grad_() for n, t in tensors(kernel_device, (3, 8)).items()}
    results = []
    for function in (gated_rms_norm, gated_rms_norm_reference):
        y = function(**inputs, eps=1e-6, **options)
        grads = torch.autograd.grad(y.square().sum(), inputs.values(), create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(penalty, inputs.values()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 8)
    fits = {"x": x, "gate": x, "weight": x[0], "eps": 1e-6}
    for change, message in (
        ({"gate": x[:1]}, "gate is"),
        ({"gate": x.long()}, "gate is"),
        ({"weight": x[0, :4]}, "weight is"),
        ({"group_size": 3}, "group_size 3"),
        ({"group_size": 0}, "group_size 0"),
        ({"activation": "relu"}, "relu"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(**{**fits, **change})


def test_compiles_to_one_graph(kernel_device):
    torch._dynamo.reset()
    inputs = tensors(kernel_device, (4, 32))
    function = torch.compile(
        functools.partial(gated_rms_norm, eps=1e-6), fullgraph=True, backend="aot_eager"
    )
    assert_matches(function, functools.partial(gated_rms_norm_reference, eps=1e-6), inputs)
