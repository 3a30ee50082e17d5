"""Gated linear units: against torch in every dtype and layout, and torch against transformers."""

import contextlib

import pytest
import torch
from oracle import assert_matches, run
from transformers.activations import ACT2FN

from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers import glu
from liger_trainer.kernels.layers.glu import geglu, geglu_reference, swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def geglu_tanh(gate, up):
    return geglu(gate, up, approximate="tanh")


def geglu_tanh_reference(gate, up):
    return geglu_reference(gate, up, approximate="tanh")


FUNCTIONS = [
    pytest.param(swiglu, swiglu_reference, id="swiglu"),
    pytest.param(geglu, geglu_reference, id="geglu"),
    pytest.param(geglu_tanh, geglu_tanh_reference, id="geglu_tanh"),
]
each_function = pytest.mark.parametrize(("function", "reference"), FUNCTIONS)


def pair(shape, dtype, device, scale=2.0):
    gate, up = torch.randn(2, *shape, device=device) * scale
    return {"gate": gate.to(dtype), "up": up.to(dtype)}


@each_function
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 16), (1, 1030), (2, 1)])
def test_matches_torch(kernel_device, function, reference, dtype, shape):
    assert_matches(function, reference, pair(shape, dtype, kernel_device))


@each_function
def test_scalars_match_torch(kernel_device, function, reference):
    assert_matches(function, reference, pair((), torch.float32, kernel_device))


@each_function
@pytest.mark.parametrize(
    ("gate_dtype", "up_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_mixed_dtypes_round_once_to_what_they_promote_to(
    kernel_device, function, reference, gate_dtype, up_dtype
):
    tensors = pair((16, 64), torch.float32, kernel_device)
    tensors = {"gate": tensors["gate"].to(gate_dtype), "up": tensors["up"].to(up_dtype)}
    assert_matches(function, reference, tensors)


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 5, 1030])
def test_halves_of_a_packed_projection(kernel_device, function, reference, dtype, width):
    def of(fn):
        return lambda packed: fn(*packed.chunk(2, dim=-1))

    packed = torch.randn(2, 3, 2 * width, device=kernel_device).to(dtype)
    assert_matches(of(function), of(reference), {"packed": packed})


@each_function
def test_each_input_has_its_own_row_stride(kernel_device, function, reference):
    def of(fn):
        return lambda wide, gate_and_more, up: (
            fn(wide.chunk(4, dim=-1)[2], up),
            fn(gate_and_more[:, :8], wide[:, 8:16]),
        )

    shapes = {"wide": (3, 32), "gate_and_more": (3, 24), "up": (3, 8)}
    tensors = {n: torch.randn(shape, device=kernel_device) for n, shape in shapes.items()}
    assert_matches(of(function), of(reference), tensors)


def test_halves_of_a_packed_projection_are_not_copied(kernel_device, monkeypatch):
    gate, up = torch.randn(3, 16, device=kernel_device).chunk(2, dim=-1)
    expected = swiglu_reference(gate, up)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("copied"))
        got = swiglu(gate, up)
    torch.testing.assert_close(got, expected)


@each_function
def test_layouts_that_are_no_rows(kernel_device, function, reference):
    gate = torch.randn(4, 3, 2, device=kernel_device).permute(2, 1, 0)
    up = torch.randn(2, 3, 8, device=kernel_device)[..., ::2]
    torch.testing.assert_close(function(gate, up), reference(gate, up))
    gate = torch.randn(2, 3, 1, device=kernel_device).expand(2, 3, 4)
    torch.testing.assert_close(function(gate, up), reference(gate, up))


@each_function
@pytest.mark.parametrize(
    "reduce", [torch.sum, lambda y: y.sum(0).square().sum(), lambda y: y.t()[1:].sum()]
)
def test_gradients_arriving_expanded_or_transposed(kernel_device, function, reference, reduce):
    tensors = pair((3, 6), torch.float32, kernel_device)

    def of(fn):
        return lambda gate, up: reduce(fn(gate, up))

    assert_matches(of(function), of(reference), tensors)


@each_function
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter
def test_extreme_inputs_are_finite_and_right(kernel_device, function, reference, dtype):
    values = [0.0, -0.0, 1e-4, -1e-4, 1.0, -1.0, 8.0, -8.0, 50.0, -50.0, 1e4, -1e4]
    gate = torch.tensor(values, device=kernel_device, dtype=dtype)
    up = torch.linspace(-2, 2, len(values), device=kernel_device).to(dtype)
    assert_matches(function, reference, {"gate": gate, "up": up})
    got, grads, _ = run(function, {"gate": gate, "up": up}, [torch.ones_like(up)])
    for value in (*got, *grads.values()):
        assert value.isfinite().all()
    assert got[0][:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(got[0][-2], gate[-2] * up[-2])
    torch.testing.assert_close(grads["up"][-1], torch.zeros_like(up[-1]))


def test_activation_is_rounded_before_the_product_as_in_torch(kernel_device):
    """A large `up` magnifies the rounding of silu(gate): without it the product would differ."""
    if kernel_device == "cpu":
        pytest.skip("the interpreter truncates to bf16 instead of rounding")
    tensors = pair((64, 1024), torch.bfloat16, kernel_device)
    assert (swiglu(**tensors) == swiglu_reference(**tensors)).float().mean() > 0.999


@each_function
@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 4)])
def test_zero_elements(kernel_device, function, reference, shape):
    assert_matches(function, reference, pair(shape, torch.bfloat16, kernel_device))


@each_function
def test_fp64_is_computed_in_fp64(kernel_device, function, reference):
    tensors = pair((3, 4), torch.float64, kernel_device)
    assert torch.equal(function(**tensors), reference(**tensors))


@each_function
def test_only_gate_and_up_are_saved(kernel_device, function, reference):
    tensors = {n: t.requires_grad_() for n, t in pair((3, 4), torch.float32, kernel_device).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(**tensors)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tensors.values()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "activation"),
    [(swiglu, "silu"), (geglu, "gelu"), (geglu_tanh, "gelu_pytorch_tanh")],
)
def test_torch_path_is_bitwise_the_mlp_of_transformers(function, activation, dtype):
    torch.manual_seed(0)
    tensors = pair((3, 4, 16), dtype, "cpu", scale=5.0)
    want, want_grads, seeds = run(lambda gate, up: ACT2FN[activation](gate) * up, tensors)
    got, got_grads, _ = run(function, tensors, seeds)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(got_grads, want_grads, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["kernel", "torch"])
@each_function
def test_compiles_to_one_graph_for_all_lengths(device, function, reference, path):
    if device == "cuda" and path == "torch":
        pytest.skip("CUDA tensors always take the kernel")
    interpret = runtime.interpreted() if path == "kernel" else contextlib.nullcontext()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with interpret, torch._dynamo.config.patch(error_on_recompile=True):
        for length in (3, 4, 9):
            assert_matches(compiled, reference, pair((2, length, 8), torch.bfloat16, device))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_ops_are_what_their_fakes_say(device, activation):
    gate, up = torch.randn(3, 16, device=device).chunk(2, dim=-1)
    up = up.to(torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    with runtime.interpreted():
        torch.library.opcheck(glu._glu_fwd.op, (gate, up, activation), test_utils=checks)
        torch.library.opcheck(
            glu._glu_bwd.op, (gate.t().t(), gate, up, activation), test_utils=checks
        )


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_offsets_above_two_to_the_31(packed):
    """The last rows, with one flat index and with rows that lie in a packed projection."""
    torch.manual_seed(0)
    width = 4096
    rows = 2**31 // width + 3
    if packed:
        both = torch.randn(rows // 2 + 3, 4 * width, dtype=torch.bfloat16, device="cuda")
        gate, up = both.chunk(2, dim=-1)
    else:
        gate = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
        up = gate.flip(0)
    y = swiglu(gate.requires_grad_(), up.requires_grad_())
    d_gate, d_up = torch.autograd.grad(y, (gate, up), y.detach())
    for part in (slice(0, 2), slice(-3, None)):
        few = [t.detach()[part].double().requires_grad_() for t in (gate, up)]
        want = swiglu_reference(*few)
        grads = torch.autograd.grad(want, few, y.detach()[part].double())
        for got, truth in zip((y, d_gate, d_up), (want, *grads), strict=True):
            torch.testing.assert_close(got[part].double(), truth, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_unsupported_inputs_are_refused(function):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="one shape"):
        function(x, x[:1])
    with pytest.raises(ValueError, match="floating point"):
        function(x.long(), x)
    with pytest.raises(ValueError, match="one device"):
        function(x, x.to("meta"))


def test_unknown_approximation_is_refused():
    with pytest.raises(ValueError, match="approximate"):
        geglu(torch.zeros(2), torch.zeros(2), approximate="sigmoid")
