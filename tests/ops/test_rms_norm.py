"""RMSNorm: the kernels against the reference, the reference against transformers."""

import functools

import pytest
import torch
from oracle import assert_matches
from strides import views_of_x
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from liger_trainer.kernels.layers.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LLAMA = {"eps": 1e-6}
OLMO2 = {"eps": 1e-6, "cast_first": False}
GEMMA = {"eps": 1e-6, "cast_first": False, "offset": 1.0}
GEMMA_ROUNDED = {"eps": 1e-6, "offset": 1.0}  # 1 + weight is rounded to weight's dtype
FORMS = [
    pytest.param(form, id=name)
    for name, form in [("llama", LLAMA), ("olmo2", OLMO2), ("gemma", GEMMA), ("g2", GEMMA_ROUNDED)]
]


def make(shape, dtype, device, weight_dtype=None):
    weight = 1 + 0.3 * torch.randn(shape[-1], device=device)
    return {
        "x": torch.randn(shape, device=device).to(dtype),
        "weight": weight.to(weight_dtype or dtype),
    }


def assert_kernel_matches(tensors, wrap=lambda norm: norm, **form):
    fused, reference = (functools.partial(f, **form) for f in (rms_norm, rms_norm_reference))
    assert_matches(wrap(fused), wrap(reference), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_in_every_dtype(kernel_device, dtype, form):
    assert_kernel_matches(make((3, 5, 96), dtype, kernel_device), **form)


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
    assert_kernel_matches(make(shape, dtype, kernel_device), **LLAMA)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_weight_of_another_dtype_promotes_as_in_torch(kernel_device, form, dtype, weight_dtype):
    tensors = make((4, 80), dtype, kernel_device, weight_dtype)
    assert_kernel_matches(tensors, **form)
    assert rms_norm(**tensors, **LLAMA).dtype == torch.float32
    assert rms_norm(**tensors, **OLMO2).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast_first", [True, False])
def test_without_weight(kernel_device, dtype, cast_first):
    x = make((4, 72), dtype, kernel_device)["x"]
    assert_kernel_matches({"x": x}, eps=1e-6, cast_first=cast_first)


@pytest.mark.parametrize("form", FORMS)
def test_rounds_where_the_reference_rounds(kernel_device, form):
    """Some forms differ only in rounding, which a tolerance on bf16 cannot tell."""
    tensors = make((64, 128), torch.bfloat16, kernel_device)
    y = rms_norm(**tensors, **form)
    for (other,) in (f.values for f in FORMS):
        differs = (y != rms_norm_reference(**tensors, **other)).float().mean()
        assert differs < 0.005 if other is form else differs > 0.05


@views_of_x
def test_x_of_any_strides(kernel_device, view):
    packed = torch.randn(4, 6, 96, device=kernel_device)
    weight = torch.randn(view(packed).shape[-1], device=kernel_device)

    def wrap(norm):
        return lambda packed, weight: norm(view(packed), weight)

    assert_kernel_matches({"packed": packed, "weight": weight}, wrap, **LLAMA)
    assert rms_norm(view(packed), weight, **LLAMA).is_contiguous()


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.sum(),
        lambda y: y.sum(0),
        lambda y: y.sum(-1),
        lambda y: y.transpose(0, 1).contiguous(),
        lambda y: y[:, 3:50:2],
    ],
    ids=["expanded", "expanded rows", "expanded columns", "transposed", "sliced"],
)
def test_dy_of_any_strides(kernel_device, use):
    def wrap(norm):
        return lambda x, weight: use(norm(x, weight))

    assert_kernel_matches(make((6, 64), torch.float32, kernel_device), wrap, **LLAMA)


def test_strided_weight(kernel_device):
    def wrap(norm):
        return lambda x, weights: norm(x, weights[:, 1])

    x, weights = (torch.randn(shape, device=kernel_device) for shape in [(3, 6), (6, 4)])
    assert_kernel_matches({"x": x, "weights": weights}, wrap, **LLAMA)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_extreme_scales(kernel_device, scale, dtype, eps):
    tensors = make((4, 96), torch.float32, kernel_device)
    tensors = {"x": (scale * tensors["x"]).to(dtype), "weight": tensors["weight"].to(dtype)}
    assert_kernel_matches(tensors, eps=eps)


def test_constant_rows(kernel_device):
    x = torch.tensor([0.0, 1.0, -3.0, 1024.0], device=kernel_device)[:, None].expand(4, 70)
    weight = torch.randn(70, device=kernel_device)
    assert_kernel_matches({"x": x.contiguous(), "weight": weight}, **GEMMA)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_rows(kernel_device, shape):
    tensors = make(shape, torch.bfloat16, kernel_device)
    assert_kernel_matches(tensors, **LLAMA)
    weight = tensors["weight"].requires_grad_()
    rms_norm(tensors["x"], weight, **LLAMA).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_frozen_weight_costs_nothing(kernel_device, monkeypatch):
    tensors = make((5, 64), torch.float32, kernel_device)
    x = tensors["x"].requires_grad_()
    y = rms_norm(x, tensors["weight"], **LLAMA)
    shapes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: shapes.append(a) or empty(*a, **k))
    y.sum().backward()
    assert shapes == [((5, 64),)]  # dx alone
    expected = rms_norm_reference(x, tensors["weight"], **LLAMA)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.sum(), x)[0])
    assert tensors["weight"].grad is None


def test_frozen_x_gives_only_the_weight_gradient(kernel_device):
    tensors = make((5, 64), torch.float32, kernel_device)
    weight = tensors["weight"].requires_grad_()
    got, expected = (
        torch.autograd.grad(norm(tensors["x"], weight, **LLAMA).square().sum(), weight)
        for norm in (rms_norm, rms_norm_reference)
    )
    torch.testing.assert_close(got, expected)


def test_fp64_never_passes_through_fp32(kernel_device):
    tensors = make((4, 64), torch.float64, kernel_device)
    x, weight = tensors.values()
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for form in (LLAMA, OLMO2):
        torch.testing.assert_close(rms_norm(x, weight, **form), expected, rtol=1e-14, atol=1e-14)


def test_wider_than_the_kernels_runs_on_the_reference(kernel_device):
    tensors = make((1, 65537), torch.float32, kernel_device)
    y = rms_norm(**tensors, **LLAMA)
    assert torch.equal(y, rms_norm_reference(**tensors, **LLAMA))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "form"), [(LlamaRMSNorm, LLAMA), (Gemma2RMSNorm, GEMMA), (Olmo2RMSNorm, OLMO2)]
)
def test_reference_is_what_transformers_computes(device, dtype, weight_dtype, module, form):
    theirs = module(64, eps=form["eps"]).to(device, weight_dtype)
    torch.nn.init.normal_(theirs.weight)
    x, x2 = (make((3, 5, 64), dtype, device)["x"].requires_grad_() for _ in range(2))
    x2.data.copy_(x.data)
    weight = theirs.weight.detach().clone().requires_grad_()
    expected, y = theirs(x), rms_norm_reference(x2, weight, **form)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    expected.backward(dy)
    y.backward(dy)
    torch.testing.assert_close(x2.grad, x.grad)
    torch.testing.assert_close(weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_compiles_to_one_graph_for_every_length(kernel_device, norm):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, weight: norm(x * 2, weight, **GEMMA) + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 16):
            tensors = make((2, length, 48), torch.bfloat16, kernel_device)
            x, weight = (t.requires_grad_() for t in tensors.values())
            y = compiled(x, weight)
            got = torch.autograd.grad(y.float().square().sum(), (x, weight))
            expected_y = norm(x * 2, weight, **GEMMA) + 1
            expected = torch.autograd.grad(expected_y.float().square().sum(), (x, weight))
            torch.testing.assert_close((y, *got), (expected_y, *expected))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16])
def test_fakes_agree_with_the_ops(kernel_device, weight_dtype):
    ops = torch.ops.liger_trainer
    tensors = make((2, 3, 40), torch.bfloat16, kernel_device, weight_dtype)
    x, weight = tensors["x"], tensors["weight"] if weight_dtype else None
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for cast_first in (True, False):
        args = (x, weight, 1e-6, 0.0, cast_first)
        torch.library.opcheck(ops.rms_norm_fwd.default, args, **checks)
        y, rstd = ops.rms_norm_fwd(*args)
        for need_dx, need_dweight in [(True, True), (True, False), (False, True)]:
            need_dweight = need_dweight and weight is not None
            args = (torch.randn_like(y), x, weight, rstd, 0.0, cast_first, need_dx, need_dweight)
            torch.library.opcheck(ops.rms_norm_bwd.default, args, **checks)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), None, "floating point"),
        (torch.tensor(1.0), None, r"\[\.\.\., H\]"),
        (torch.ones(2, 4), torch.ones(3), r"\(4,\)"),
        (torch.ones(2, 4), torch.ones(2, 4), r"\(4,\)"),
        (torch.ones(2, 4), torch.ones(4, dtype=torch.int64), "int64"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), "meta"),
    ],
)
def test_unsupported_input_is_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [128, 4096])
def test_more_than_2_to_the_31_elements(H):
    rows = 2**31 // H + 5
    x = torch.empty(rows, H, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.randn(H, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dy = torch.zeros_like(x)
    dy[-4:].normal_()  # so that dweight is that of the last rows
    y = rms_norm(x, weight, **LLAMA)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    last = x[-4:].detach().requires_grad_()
    last_y = rms_norm(last, weight, **LLAMA)
    expected = torch.autograd.grad(last_y, (last, weight), dy[-4:])
    torch.testing.assert_close((y[-4:], dx[-4:], dweight), (last_y, *expected))
    assert not dx[:-4].any()
