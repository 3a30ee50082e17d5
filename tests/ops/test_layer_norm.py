"""LayerNorm: the kernels against the reference, the reference against torch and Cohere's norm."""

import functools

import pytest
import torch
from oracle import assert_matches
from strides import views_of_x
from transformers.models.cohere.modeling_cohere import CohereLayerNorm

from liger_trainer.kernels.layers.layer_norm import layer_norm, layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def make(shape, dtype, device, parameters=("weight", "bias"), parameter_dtype=None):
    tensors = {"x": torch.randn(shape, device=device).to(dtype)}
    for name in parameters:
        value = (name == "weight") + 0.3 * torch.randn(shape[-1], device=device)
        tensors[name] = value.to(parameter_dtype or dtype)
    return tensors


def assert_kernel_matches(tensors, wrap=lambda norm: norm, eps=EPS):
    fused, reference = (functools.partial(f, eps=eps) for f in (layer_norm, layer_norm_reference))
    assert_matches(wrap(fused), wrap(reference), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [("weight", "bias"), ("weight",), ("bias",), ()], ids=str)
def test_any_parameter_may_be_absent(kernel_device, dtype, parameters):
    assert_kernel_matches(make((3, 5, 96), dtype, kernel_device, parameters))


@pytest.mark.parametrize(
    "shape",
    # One row, one column, odd widths, each row of the tile tables, more rows than programs hold.
    [
        *[(7,), (1, 3), (3, 63), (2, 3, 100), (2, 3, 2, 130), (3, 2304), (2, 5120), (2, 16384)],
        *[(1, 16385), (2, 1, 32768), (1500, 8), (50, 2048)],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_shape_matches(kernel_device, shape, dtype):
    assert_kernel_matches(make(shape, dtype, kernel_device))


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_output_keeps_the_dtype_of_x(kernel_device, dtype, parameter_dtype):
    tensors = make((4, 80), dtype, kernel_device, parameter_dtype=parameter_dtype)
    assert_kernel_matches(tensors)
    assert layer_norm(**tensors, eps=EPS).dtype == dtype


def test_rounds_once(kernel_device):
    """y is rounded to bf16 after weight and bias, not before: a tolerance cannot tell."""
    tensors = make((64, 128), torch.bfloat16, kernel_device)
    y = layer_norm(**tensors, eps=EPS)
    differs = (y != layer_norm_reference(**tensors, eps=EPS)).float().mean()
    assert differs < 0.005


@views_of_x
def test_x_of_any_strides(kernel_device, view):
    packed = torch.randn(4, 6, 96, device=kernel_device)
    weight = torch.randn(view(packed).shape[-1], device=kernel_device)

    def wrap(norm):
        return lambda packed, weight: norm(view(packed), weight)

    assert_kernel_matches({"packed": packed, "weight": weight}, wrap)
    assert layer_norm(view(packed), weight, eps=EPS).is_contiguous()


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.sum(0),
        lambda y: y.sum(-1),
        lambda y: y.transpose(0, 1).contiguous(),
        lambda y: y[:, 3:50:2],
    ],
    ids=["expanded rows", "expanded columns", "transposed", "sliced"],
)
def test_dy_of_any_strides(kernel_device, use):
    def wrap(norm):
        return lambda x, weight, bias: use(norm(x, weight, bias))

    assert_kernel_matches(make((6, 64), torch.float32, kernel_device), wrap)


def test_strided_parameters(kernel_device):
    def wrap(norm):
        return lambda x, parameters: norm(x, parameters[:, 0], parameters[:, 1])

    x, parameters = (torch.randn(shape, device=kernel_device) for shape in [(3, 6), (6, 2)])
    assert_kernel_matches({"x": x, "parameters": parameters}, wrap)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(kernel_device, scale, shift, dtype):
    """A mean far from 0 cancels unless it is subtracted before squares are taken."""
    tensors = make((4, 96), torch.float32, kernel_device)
    tensors["x"] = scale * (tensors["x"] + shift)
    assert_kernel_matches({name: t.to(dtype) for name, t in tensors.items()})


@pytest.mark.parametrize("width", [64, 70])
def test_constant_rows(kernel_device, width):
    """Powers of two, whose mean is exact: the variance is then 0 and only eps is left."""
    x = torch.tensor([0.0, 1.0, -4.0, 1024.0], device=kernel_device)[:, None].repeat(1, width)
    tensors = make((4, width), torch.float32, kernel_device)
    assert_kernel_matches({**tensors, "x": x})
    y = layer_norm(x, bias=tensors["bias"], eps=EPS)
    assert torch.equal(y, tensors["bias"].expand(4, width))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_rows(kernel_device, shape):
    tensors = make(shape, torch.bfloat16, kernel_device)
    assert_kernel_matches(tensors)
    leaves = [tensors[name].requires_grad_() for name in ("weight", "bias")]
    grads = torch.autograd.grad(layer_norm(**tensors, eps=EPS).sum(), leaves)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("trained", ["weight", "bias", None])
def test_frozen_parameters_cost_nothing(kernel_device, monkeypatch, trained):
    tensors = make((1, 64), torch.float32, kernel_device)
    leaves = [t.requires_grad_() for name, t in tensors.items() if name in ("x", trained)]
    y = layer_norm(**tensors, eps=EPS)
    sizes, empty = [], torch.empty

    def recording(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", recording)
    got = torch.autograd.grad(y.square().sum(), leaves)
    assert sizes == [64, 64 * (trained is not None)]  # dx, then partials of one program
    expected = layer_norm_reference(**tensors, eps=EPS)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), leaves))


def test_frozen_x_gives_only_parameter_gradients(kernel_device):
    tensors = make((5, 64), torch.float32, kernel_device)
    leaves = [tensors[name].requires_grad_() for name in ("weight", "bias")]
    got, expected = (
        torch.autograd.grad(norm(**tensors, eps=EPS).square().sum(), leaves)
        for norm in (layer_norm, layer_norm_reference)
    )
    torch.testing.assert_close(got, expected)


def test_fp64_never_passes_through_fp32(kernel_device):
    tensors = make((4, 64), torch.float64, kernel_device)
    x, weight, bias = tensors.values()
    centred = x - x.mean(-1, keepdim=True)
    expected = weight * centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() + bias
    torch.testing.assert_close(layer_norm(**tensors, eps=EPS), expected, rtol=1e-13, atol=1e-14)


def test_wider_than_the_kernels_runs_on_the_reference(kernel_device):
    tensors = make((1, 65537), torch.float32, kernel_device)
    y = layer_norm(**tensors, eps=EPS)
    assert torch.equal(y, layer_norm_reference(**tensors, eps=EPS))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
def test_rows_of_one_column_are_their_bias(kernel_device, scale):
    """x - mean is 0, however large x is."""
    for path in (layer_norm, layer_norm_reference):
        tensors = make((7, 1), torch.float32, kernel_device)
        leaves = {n: t.mul(scale if n == "x" else 1).requires_grad_() for n, t in tensors.items()}
        y = path(**leaves, eps=EPS)
        assert torch.equal(y, leaves["bias"].expand(7, 1))
        dx, dweight = torch.autograd.grad(y.sum(), (leaves["x"], leaves["weight"]))
        assert not dx.any()
        assert not dweight.any()


def both_ways(theirs, x, weight, bias=None):
    """(output, gradients) of a module and of the reference on the same tensors."""
    ours = functools.partial(layer_norm_reference, weight=weight, bias=bias, eps=EPS)
    leaves = [t for t in (x, weight, bias) if t is not None]
    dy = torch.randn_like(x)
    parameters = [x, *theirs.parameters()]
    for norm, inputs in ((theirs, parameters), (ours, leaves)):
        y = norm(x)
        yield y, torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_what_torch_computes(device, dtype, bias):
    theirs = torch.nn.LayerNorm(64, eps=EPS, bias=bias, device=device, dtype=dtype)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    copies = [p.detach().clone().requires_grad_() for p in theirs.parameters()]
    x = make((3, 5, 64), dtype, device)["x"].requires_grad_()
    expected, got = both_ways(theirs, x, *copies)
    tolerance = 4 * torch.finfo(dtype).eps  # torch rounds inside its backward
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_what_cohere_computes(device, dtype, weight_dtype):
    theirs = CohereLayerNorm(64, eps=EPS).to(device, weight_dtype)
    torch.nn.init.normal_(theirs.weight)
    x = make((3, 5, 64), dtype, device)["x"].requires_grad_()
    expected, got = both_ways(theirs, x, theirs.weight.detach().clone().requires_grad_())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", [layer_norm, layer_norm_reference])
def test_compiles_to_one_graph_for_every_length(kernel_device, norm):
    def fn(x, weight, bias):
        return norm(x * 2, weight, bias, eps=EPS) + 1

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 16):
            tensors = make((2, length, 48), torch.bfloat16, kernel_device)
            leaves = [t.requires_grad_() for t in tensors.values()]
            y, expected_y = compiled(*leaves), fn(*leaves)
            got, expected = (
                torch.autograd.grad(out.float().square().sum(), leaves) for out in (y, expected_y)
            )
            torch.testing.assert_close((y, *got), (expected_y, *expected))


@pytest.mark.parametrize("parameters", [("weight", "bias"), ("weight",), ("bias",), ()], ids=str)
def test_fakes_agree_with_the_ops(kernel_device, parameters):
    ops = torch.ops.liger_trainer
    tensors = make((2, 3, 40), torch.bfloat16, kernel_device, parameters, torch.float32)
    x, weight, bias = (tensors.get(name) for name in ("x", "weight", "bias"))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    args = (x, weight, bias, EPS)
    torch.library.opcheck(ops.layer_norm_fwd.default, args, **checks)
    y, mean, rstd = ops.layer_norm_fwd(*args)
    needed = (weight is not None, bias is not None)
    bias_dtype = None if bias is None else bias.dtype
    for flags in [(True, *needed), (False, *needed), (True, False, False)]:
        args = (torch.randn_like(y), x, weight, bias_dtype, mean, rstd, *flags)
        torch.library.opcheck(ops.layer_norm_bwd.default, args, **checks)


@pytest.mark.parametrize(
    ("x", "parameters", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), {}, "floating point"),
        (torch.tensor(1.0), {}, r"\[\.\.\., H\]"),
        (torch.ones(2, 4), {"weight": torch.ones(3)}, r"weight .*\(4,\)"),
        (torch.ones(2, 4), {"bias": torch.ones(2, 4)}, r"bias .*\(4,\)"),
        (torch.ones(2, 4), {"weight": torch.ones(4, dtype=torch.int64)}, "int64"),
        (torch.ones(2, 4), {"bias": torch.ones(4, device="meta")}, "bias is on meta"),
    ],
)
def test_unsupported_input_is_refused(x, parameters, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(x, **parameters, eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [128, 4096])
def test_more_than_2_to_the_31_elements(H):
    rows = 2**31 // H + 5
    x = torch.empty(rows, H, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    parameters = torch.randn(2, H, dtype=torch.bfloat16, device="cuda")
    weight, bias = (p.requires_grad_() for p in parameters.unbind())
    dy = torch.zeros_like(x)
    dy[-4:].normal_()  # so that the parameters' gradients are those of the last rows
    y = layer_norm(x, weight, bias, eps=EPS)
    dx, *grads = torch.autograd.grad(y, (x, weight, bias), dy)
    last = x[-4:].detach().requires_grad_()
    last_y = layer_norm(last, weight, bias, eps=EPS)
    expected = torch.autograd.grad(last_y, (last, weight, bias), dy[-4:])
    torch.testing.assert_close((y[-4:], dx[-4:], *grads), (last_y, *expected))
    assert not dx[:-4].any()
