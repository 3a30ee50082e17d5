"""Rotary embedding: each option, layout and dtype against torch; torch against transformers."""

import contextlib
import importlib
import inspect

import pytest
import torch
from oracle import assert_matches, run

from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers import rope as rope_module
from liger_trainer.kernels.layers.rope import rope, rope_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"interleaved": True},
    {"half_table": True},
    {"interleaved": True, "half_table": True},
    {"narrow_table": True},
    {"interleaved": True, "narrow_table": True},
    {"interleaved": True, "split": True},
    {"interleaved": True, "split": True, "half_table": True},
    {"interleaved": True, "split": True, "narrow_table": True, "inverse": True},
    {"inverse": True},
    {"interleaved": True, "inverse": True},
    {"keep_dtype": True},
    {"interleaved": True, "keep_dtype": True},
    {"trailing": True},
    {"interleaved": True, "narrow_table": True, "trailing": True, "keep_dtype": True},
    {"interleaved": True, "split": True, "inverse": True, "trailing": True},
]


def name_options(options):
    return "-".join(options) or "plain"


def transposed(B, H, S, D, dtype, device):
    """As attention makes it: [B, H, S, D], a view of [B, S, H, D]."""
    return torch.randn(B, S, H, D, dtype=dtype, device=device).transpose(1, 2)


def random_tables(B, S, R, dtype, device, narrow_table=False):
    """No symmetry between the two halves, so that a wrong layout or transpose shows."""
    width = R // 2 if narrow_table else R
    # Cut from wider ones: a wrong width shows, too.
    return torch.randn(2, B, S, width + 1, dtype=dtype, device=device)[..., :width].unbind(0)


def angle_tables(position_ids, R):
    frequencies = 100.0 ** -(torch.arange(0, R, 2, device=position_ids.device) / R)
    angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def assert_rope_matches(q, k, cos, sin, **options):
    assert_matches(
        lambda q, k: rope(q, k, cos, sin, **options),
        lambda q, k: rope_reference(q, k, cos, sin, **options),
        {"q": q, "k": k},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_options_match_torch(kernel_device, dtype, options):
    q = transposed(2, 3, 2, 12, dtype, kernel_device)
    k = transposed(2, 1, 2, 12, dtype, kernel_device)
    narrow = options.get("narrow_table", False)
    assert_rope_matches(q, k, *random_tables(2, 2, 12, dtype, kernel_device, narrow), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_channels_outside_the_rotation_pass_through(kernel_device, options):
    dtype = torch.bfloat16
    q = transposed(1, 4, 2, 14, dtype, kernel_device)
    k = transposed(1, 2, 2, 14, dtype, kernel_device)
    narrow = options.get("narrow_table", False)
    cos, sin = random_tables(1, 2, 10, torch.float32, kernel_device, narrow)
    assert_rope_matches(q, k, cos, sin, **options)
    passed = slice(0, 4) if options.get("trailing") else slice(10, 14)
    assert torch.equal(rope(q, k, cos, sin, **options)[0][..., passed], q[..., passed])


@pytest.mark.parametrize(
    ("table", "x"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("keep_dtype", [False, True])
def test_mixed_dtypes_promote_as_torch_does(kernel_device, table, x, keep_dtype):
    q = transposed(1, 2, 3, 8, x, kernel_device)
    k = transposed(1, 2, 3, 8, x, kernel_device)
    tables = random_tables(1, 3, 8, table, kernel_device)
    assert_rope_matches(q, k, *tables, keep_dtype=keep_dtype)


def test_q_and_k_may_differ_in_dtype(kernel_device):
    q = transposed(1, 2, 3, 8, torch.float32, kernel_device)
    k = transposed(1, 2, 3, 8, torch.bfloat16, kernel_device)
    assert_rope_matches(q, k, *random_tables(1, 3, 8, torch.bfloat16, kernel_device))


def test_q_may_come_alone(kernel_device):
    q = transposed(2, 3, 5, 12, torch.float32, kernel_device)
    none = q.detach()[:, :0]
    cos, sin = random_tables(2, 5, 8, torch.float32, kernel_device)
    assert_matches(
        lambda q: rope(q, none, cos, sin)[0],
        lambda q: rope_reference(q, q, *(t.to(q.dtype) for t in (cos, sin)))[0],
        {"q": q},
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D", [2, 64, 80, 96, 128, 256])
def test_head_dimensions(kernel_device, D, interleaved):
    q = transposed(1, 5, 2, D, torch.float32, kernel_device)
    k = transposed(1, 1, 2, D, torch.float32, kernel_device)
    tables = random_tables(1, 2, D, torch.float32, kernel_device)
    assert_rope_matches(q, k, *tables, interleaved=interleaved)


@pytest.mark.parametrize(("Hq", "Hk"), [(1, 1), (7, 7), (70, 9), (65, 1), (2, 6)])
def test_head_counts_including_several_programs_per_position(kernel_device, Hq, Hk):
    q = transposed(1, Hq, 2, 128, torch.float32, kernel_device)
    k = transposed(1, Hk, 2, 128, torch.float32, kernel_device)
    assert_rope_matches(q, k, *random_tables(1, 2, 128, torch.float32, kernel_device))


def test_one_table_is_shared_by_the_batch(kernel_device):
    q = transposed(3, 2, 4, 8, torch.float32, kernel_device)
    k = transposed(3, 1, 4, 8, torch.float32, kernel_device)
    cos, sin = random_tables(1, 4, 8, torch.float32, kernel_device)
    assert_rope_matches(q, k, cos, sin)
    assert_rope_matches(q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))


def test_packed_sequences_rotate_as_if_alone(kernel_device):
    q = transposed(1, 2, 5, 8, torch.float32, kernel_device)
    k = transposed(1, 1, 5, 8, torch.float32, kernel_device)
    packed = torch.tensor([[0, 1, 2, 0, 1]], device=kernel_device)
    q_out, k_out = rope(q, k, *angle_tables(packed, 8))
    for part in (slice(0, 3), slice(3, 5)):
        alone = rope(q[:, :, part], k[:, :, part], *angle_tables(packed[:, part], 8))
        assert torch.equal(q_out[:, :, part], alone[0])
        assert torch.equal(k_out[:, :, part], alone[1])


def test_inverse_undoes_the_rotation(kernel_device):
    q = transposed(2, 2, 3, 8, torch.float32, kernel_device)
    k = transposed(2, 1, 3, 8, torch.float32, kernel_device)
    cos, sin = angle_tables(torch.tensor([[0, 1, 2], [5, 6, 7]], device=kernel_device), 8)
    back = rope(*rope(q, k, cos, sin), cos, sin, inverse=True)
    torch.testing.assert_close(back, (q, k))


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


def test_only_one_of_q_and_k_needs_a_gradient(kernel_device):
    cos, sin = random_tables(1, 3, 8, torch.float32, kernel_device)
    q = transposed(1, 2, 3, 8, torch.float32, kernel_device).requires_grad_()
    k = transposed(1, 2, 3, 8, torch.float32, kernel_device)
    got, want = (
        torch.autograd.grad(fn(q, k, cos, sin)[0].sum(), q) for fn in (rope, rope_reference)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("B", "Hq", "S"), [(2, 3, 0), (0, 3, 4), (2, 0, 4), (2, 1, 1)])
def test_zero_or_one_element(kernel_device, B, Hq, S):
    q = transposed(B, Hq, S, 8, torch.float32, kernel_device)
    k = transposed(B, 2, S, 8, torch.float32, kernel_device)
    assert_rope_matches(q, k, *random_tables(1, S, 8, torch.float32, kernel_device))


def test_tables_that_require_a_gradient_get_one(kernel_device):
    q = transposed(2, 2, 3, 8, torch.float32, kernel_device)
    k = transposed(2, 1, 3, 8, torch.float32, kernel_device)
    cos, sin = random_tables(1, 3, 8, torch.float32, kernel_device)
    assert_matches(rope, rope_reference, {"q": q, "k": k, "cos": cos, "sin": sin})


def test_fp64_is_computed_in_fp64(kernel_device):
    q = transposed(1, 2, 3, 8, torch.float64, kernel_device)
    tables = random_tables(1, 3, 8, torch.float64, kernel_device)
    torch.testing.assert_close(
        rope(q, q, *tables), rope_reference(q, q, *tables), rtol=1e-15, atol=0
    )


def test_nothing_but_the_tables_is_saved(kernel_device):
    cos, sin = random_tables(1, 3, 8, torch.float32, kernel_device)
    q = transposed(1, 2, 3, 8, torch.float32, kernel_device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q, q, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


DEEPSEEK_V4 = {"interleaved": True, "narrow_table": True, "trailing": True, "keep_dtype": True}
THEIRS = [
    ("llama", 8, {}),
    ("phi3", 6, {}),
    ("olmo2", 8, {"keep_dtype": True}),
    ("cohere", 8, {"interleaved": True, "keep_dtype": True}),
    ("glm4", 8, {"interleaved": True, "half_table": True}),
    ("glm4", 4, {"interleaved": True, "half_table": True}),
    ("deepseek_v3", 8, {"interleaved": True, "split": True, "half_table": True}),
    ("gpt_oss", 8, {"narrow_table": True}),
    ("gemma3n", 8, {}),
    ("deepseek_v4", 8, DEEPSEEK_V4),
    ("deepseek_v4", 6, DEEPSEEK_V4),
]


@pytest.mark.parametrize(("model", "R", "options"), THEIRS, ids=lambda p: str(p) if p else "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["fp32_table", "same_table"])
def test_reference_is_bitwise_the_function_of_transformers(model, R, options, dtype, table_dtype):
    if model == "olmo2":
        table_dtype = torch.float32  # its rotary module returns fp32 whatever the model's dtype
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    q, k = (transposed(2, H, 3, 8, dtype, "cpu") for H in (4, 2))
    cos, sin = random_tables(2, 3, R, table_dtype or dtype, "cpu")
    if options.get("narrow_table"):
        cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    if options.get("split"):  # older versions of DeepSeek's read both halves, which are equal
        cos, sin = (table[..., : R // 2].repeat(1, 1, 2) for table in (cos, sin))
    tensors = {"q": q, "k": k}
    name = "apply_rotary_pos_emb" + ("_interleave" if options.get("split") else "")

    def ours(q, k):
        return rope(q, k, cos, sin, **options)

    function = getattr(modeling, name)

    def theirs(q, k):
        if "k" in inspect.signature(function).parameters:
            return function(q, k, cos, sin)
        return function(q, cos, sin), function(k, cos, sin)

    want, want_grads, seeds = run(theirs, tensors)
    got, got_grads, _ = run(ours, tensors, seeds)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    # The backward of these rounds both products of the sum, ours the sum.
    if model in ("olmo2", "deepseek_v4"):
        assert_matches(ours, theirs, tensors)
    else:
        torch.testing.assert_close(got_grads, want_grads, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["kernel", "torch"])
def test_compiles_to_one_graph_for_all_lengths(device, path):
    if device == "cuda" and path == "torch":
        pytest.skip("CUDA tensors always take the kernel")
    interpret = runtime.interpreted() if path == "kernel" else contextlib.nullcontext()
    torch._dynamo.reset()
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager", dynamic=True)
    with interpret, torch._dynamo.config.patch(error_on_recompile=True):
        for S in (3, 5, 11):  # a length equal to another size would be taken for that size
            q = transposed(2, 4, S, 8, torch.bfloat16, device)
            k = transposed(2, 2, S, 8, torch.bfloat16, device)
            cos, sin = random_tables(1, S, 6, torch.float32, device)
            assert_matches(
                lambda q, k, t=(cos, sin): compiled(q, k, *t),
                lambda q, k, t=(cos, sin): rope_reference(q, k, *t),
                {"q": q, "k": k},
            )


@pytest.mark.parametrize("heads_inner", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_op_is_what_its_fake_says(device, heads_inner, backward):
    q = transposed(2, 4, 3, 8, torch.bfloat16, device)
    k = transposed(2, 2, 3, 8, torch.bfloat16, device)
    tables = random_tables(1, 3, 8, torch.float32, device)
    flags = (heads_inner, False, False, False, False, False, False, backward)
    with runtime.interpreted():
        torch.library.opcheck(
            rope_module._rope_op.op,
            (q, k, *tables, torch.float32, torch.bfloat16, *flags),
            test_utils=("test_schema", "test_faketensor"),
        )


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


Q, K, TABLE = (2, 4, 3, 8), (2, 2, 3, 8), (1, 3, 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), K, TABLE, TABLE), "q and k must be"),
        ((Q, (2, 2, 4, 8), TABLE, TABLE), "q and k must be"),
        ((Q, (3, 2, 3, 8), TABLE, TABLE), "q and k must be"),
        ((Q, K, (3, 8), (3, 8)), "cos and sin"),
        ((Q, K, TABLE, (1, 3, 6)), "cos and sin"),
        ((Q, K, (3, 3, 8), (3, 3, 8)), "cos and sin"),
        ((Q, K, (1, 4, 8), (1, 4, 8)), "cos and sin"),
        ((Q, K, (1, 3, 5), (1, 3, 5)), "got 5"),
        ((Q, K, (1, 3, 10), (1, 3, 10)), "got 10"),
        ((Q, K, (1, 3, 0), (1, 3, 0)), "got 0"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        rope(*(torch.zeros(shape) for shape in shapes))


def test_wrong_options_are_refused():
    q, k, table = torch.zeros(Q), torch.zeros(K), torch.zeros(TABLE)
    with pytest.raises(ValueError, match="got 16"):
        rope(q, k, table, table, narrow_table=True)
    with pytest.raises(ValueError, match="set interleaved"):
        rope(q, k, table, table, split=True)


def test_wrong_dtypes_and_devices_are_refused():
    q, k, table = torch.zeros(Q), torch.zeros(K), torch.zeros(TABLE)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        rope(q.long(), k, table, table)
    with pytest.raises(ValueError, match=r"torch\.complex64"):
        rope(q, k, table.to(torch.complex64), table.to(torch.complex64))
    with pytest.raises(ValueError, match="one dtype"):
        rope(q, k, table, table.half())
    with pytest.raises(ValueError, match="one device"):
        rope(q, k.to("meta"), table, table)
