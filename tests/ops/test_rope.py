"""Rotary embedding: each option, shape and dtype against torch; what is refused."""

import contextlib

import pytest
import torch
from oracle import assert_matches
from rotary_inputs import DTYPES, assert_rope_matches, random_tables, transposed

from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers.rope import rope, rope_reference
from liger_trainer.kernels.layers.rope_kernel import rope_op

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


def angle_tables(position_ids, R):
    frequencies = 100.0 ** -(torch.arange(0, R, 2, device=position_ids.device) / R)
    angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_options_match_torch(kernel_device, options):
    dtype = torch.float32
    q = transposed(2, 3, 2, 12, dtype, kernel_device)
    k = transposed(2, 1, 2, 12, dtype, kernel_device)
    narrow = options.get("narrow_table", False)
    assert_rope_matches(q, k, *random_tables(2, 2, 12, dtype, kernel_device, narrow), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_dtypes_match_torch(kernel_device, dtype, interleaved):
    q = transposed(2, 3, 2, 12, dtype, kernel_device)
    k = transposed(2, 1, 2, 12, dtype, kernel_device)
    tables = random_tables(2, 2, 12, dtype, kernel_device)
    assert_rope_matches(q, k, *tables, interleaved=interleaved)


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
@pytest.mark.parametrize("D", [2, 80, 128, 256])
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
            rope_op.op,
            (q, k, *tables, torch.float32, torch.bfloat16, *flags),
            test_utils=("test_schema", "test_faketensor"),
        )


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
