import itertools

import pytest
import torch
from distillation import (
    BETAS,
    CHANGES,
    ROWS,
    TOKENS,
    VOCAB,
    assert_linear,
    operands,
    problem,
    reduced,
)

from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.kernels.linear.divergence import (
    linear_divergence,
    linear_divergence_reference,
)
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions


@pytest.fixture(autouse=True)
def _small_first_part(monkeypatch):
    """Make the part that is queued before the token count is known small, like these problems."""
    monkeypatch.setattr(linear_head, "FIRST_ROWS", 2)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_matches_fp64(device, poisoned, beta, rows, reduction):
    options = DivergenceOptions(beta=beta, **CHANGES)
    assert_linear(*problem(device), options, reduction, rows)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_matches_fp64_with_the_kernel(kernel_device, beta, reduction):
    options = DivergenceOptions(beta=beta, **CHANGES)
    assert_linear(*problem(kernel_device, tokens=7), options, reduction, rows=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_16_bit_matches_fp64(device, poisoned, dtype, rows, reduction):
    assert_linear(*problem(device, dtype), reduction=reduction, rows=rows)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_16_bit_matches_fp64_with_the_kernel(kernel_device, reduction):
    assert_linear(*problem(kernel_device, torch.bfloat16, 7), reduction=reduction, rows=3)


@pytest.mark.parametrize("dropped", [0, 1, 2])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("tokens", [1, 4, 13])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_any_number_of_tokens_kept(device, poisoned, dropped, rows, tokens, reduction):
    problem_ = problem(device, tokens=tokens, dropped=dropped)
    assert_linear(*problem_, reduction=reduction, rows=rows)


@pytest.mark.parametrize("dropped", [0, 1, 2])
@pytest.mark.parametrize("rows", [3])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_any_number_of_tokens_kept_with_the_kernel(kernel_device, dropped, rows, reduction):
    """The first part is computed before the number is known."""
    problem_ = problem(kernel_device, tokens=7, dropped=dropped)
    assert_linear(*problem_, reduction=reduction, rows=rows)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [64, 6])
def test_low_rank_adapter_is_a_second_term(device, poisoned, rows, reduction):
    student, teacher, mask = problem(device)
    student["low"] = torch.randn(TOKENS, 4, device=device)
    student["adapter"] = torch.randn(VOCAB, 4, device=device)
    assert_linear(student, teacher, mask, reduction=reduction, rows=rows)


@pytest.mark.parametrize("rows", [64, 6])
def test_teacher_with_a_low_rank_adapter(device, rows):
    student, teacher, mask = problem(device)
    first, second = (teacher["teacher_hidden"], student["hidden"])
    weights = teacher["teacher_weight"], student["weight"] * 0.3
    got = linear_divergence(
        student["hidden"], student["weight"], [first, second], weights, mask, max_rows=rows
    )[0]
    expected = linear_divergence_reference(
        [student["hidden"]], [student["weight"]], [first, second], weights
    )[0]
    torch.testing.assert_close(got, expected[mask].mean())


def test_without_bias_and_with_leading_dimensions(device, poisoned):
    student, teacher, mask = problem(device)
    shape = (4, 5)
    hidden, hidden_t = student["hidden"], teacher["teacher_hidden"]
    flat = linear_divergence(
        hidden, student["weight"], hidden_t, teacher["teacher_weight"], mask, reduction="none"
    )
    deep = linear_divergence(
        hidden.view(*shape, -1), student["weight"], hidden_t.view(*shape, -1),
        teacher["teacher_weight"], mask.view(shape), reduction="none",
    )  # fmt: skip
    for a, b in zip(flat, deep, strict=True):
        assert b.shape == shape
        torch.testing.assert_close(a, b.flatten())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_num_items_divides_the_sum(device, reduction):
    student, teacher, mask = problem(device)
    arguments = (student["hidden"], student["weight"], *list(teacher.values())[:2], mask)
    total = linear_divergence(*arguments, reduction="sum")[0]
    for items in (11, torch.tensor(11, device=device)):
        got = linear_divergence(*arguments, reduction=reduction, num_items_in_batch=items)[0]
        torch.testing.assert_close(got, total / 11)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fp32_weight_with_16_bit_hidden_gets_an_fp32_gradient(device, rows, reduction):
    student, teacher, mask = problem(device, torch.bfloat16)
    weight = student["weight"].float().requires_grad_()
    bias = student["bias"].float().requires_grad_()
    teacher = (teacher["teacher_hidden"].float(), teacher["teacher_weight"])
    values = linear_divergence(
        student["hidden"], weight, *teacher, mask, bias, reduction=reduction, max_rows=rows
    )[0]
    values.sum().backward()
    exact = [student[name].double().requires_grad_() for name in ("weight", "bias")]
    expected = linear_divergence_reference(
        [student["hidden"].double()], exact[:1], [teacher[0].double()], [teacher[1].double()],
        exact[1],
    )[0]  # fmt: skip
    reduced(expected, mask, reduction).sum().backward()
    for got, truth in zip((weight, bias), exact, strict=True):
        assert got.grad.dtype == torch.float32
        assert (got.grad - truth.grad).norm() < 0.03 * truth.grad.norm()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_any_token_divergence_and_gradients_are_zero(kernel_device, reduction):
    for tokens, rows in itertools.product((0, 7), (64, 3)):
        student, teacher, mask = problem(kernel_device, tokens=tokens, dropped=1)
        leaves = [t.requires_grad_() for t in student.values()]
        values, entropy = linear_divergence(
            leaves[0], leaves[1], *list(teacher.values())[:2], mask, leaves[2],
            reduction=reduction, max_rows=rows,
        )  # fmt: skip
        values.sum().backward()
        assert not values.any()
        assert not entropy.any()
        assert not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_gives_the_same(device, poisoned, reduction):
    student, teacher, mask = problem(device)
    leaves = [t.requires_grad_() for t in student.values()]
    for rows in ROWS.values():
        values, _ = linear_divergence(
            *operands(student, teacher, mask), student["bias"], reduction=reduction, max_rows=rows
        )
        first = torch.autograd.grad(values.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(values.sum(), leaves)
        assert all(map(torch.equal, first, second))


def test_teacher_parameters_are_constants(device):
    """A teacher that ran under no_grad has parameters that require a gradient all the same."""
    student, teacher, mask = problem(device)
    weight, bias = (
        torch.nn.Parameter(teacher[name]) for name in ("teacher_weight", "teacher_bias")
    )
    student["hidden"].requires_grad_()
    linear_divergence(
        student["hidden"], student["weight"], teacher["teacher_hidden"], weight, mask,
        teacher_bias=bias,
    )[0].backward()  # fmt: skip
    assert student["hidden"].grad.any()
    assert weight.grad is None
    assert bias.grad is None


def test_a_head_may_be_its_own_teacher(device):
    """Self-distillation: one weight, other hidden states; only the student's use is trained."""
    student, _, mask = problem(device)
    weight = student["weight"].requires_grad_()
    old = torch.randn_like(student["hidden"])
    linear_divergence(student["hidden"], weight, old, weight, mask)[0].backward()
    exact = weight.detach().clone().requires_grad_()
    values = linear_divergence_reference([student["hidden"]], [exact], [old], [weight.detach()])[0]
    values[mask].mean().backward()
    torch.testing.assert_close(weight.grad, exact.grad)


def test_works_in_the_middle_of_a_compiled_function(device):
    student, teacher, mask = problem(device)

    def step(hidden, weight, hidden_t, weight_t, mask):
        return 2 * linear_divergence(hidden * 2, weight, hidden_t, weight_t, mask)[0]

    torch._dynamo.reset()
    leaves = [student[name].requires_grad_() for name in ("hidden", "weight")]
    inputs = operands(student, teacher, mask)
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*inputs), leaves)
    for a, b in zip(got, torch.autograd.grad(step(*inputs), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beta", BETAS)
def test_agrees_with_trl(device, beta):
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    student, teacher, mask = problem(device)
    options = DivergenceOptions(beta=beta, **CHANGES)
    leaves = [t.requires_grad_() for t in student.values()]
    expected = trl.ChunkedDivergenceFunction.apply(
        *leaves, *teacher.values(), beta, options.temperature, options.scale, options.softcap,
        options.teacher_scale, options.teacher_softcap,
    )  # fmt: skip
    got = linear_divergence(
        *operands(student, teacher, mask), student["bias"], teacher["teacher_bias"],
        options=options, reduction="none",
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.where(mask, 0.0))
    grads = torch.autograd.grad(got[0].sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(expected[0][mask].sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_refuses_operands_that_do_not_fit():
    student, teacher, mask = problem("cpu")
    hidden, weight, hidden_t, weight_t, _ = operands(student, teacher, mask)

    def refuses(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            linear_divergence(*args, **kwargs)

    fits = (hidden, weight, hidden_t, weight_t)
    refuses("same tokenizer", hidden, weight, hidden_t, weight_t[:-1], mask)
    refuses("student: .*does not fit", hidden[:, :-1], weight, hidden_t, weight_t, mask)
    refuses("teacher: .*does not fit", hidden, weight, hidden_t, weight, mask)
    refuses("teacher: .*floating", hidden, weight, hidden_t.long(), weight_t, mask)
    refuses("same tokens", hidden, weight, hidden_t[:-1], weight_t, mask)
    refuses("same tokens", *fits, mask[:-1])
    refuses(r"completion_mask\.bool", *fits, mask.long())
    refuses("one device", hidden, weight, hidden_t.to("meta"), weight_t.to("meta"), mask)
    refuses("one device", *fits, mask.to("meta"))
    refuses("student: bias", *fits, mask, student["bias"][:-1])
    refuses("teacher: bias", *fits, mask, None, student["bias"].long())
    refuses("student: bias", *fits, mask, student["bias"].to("meta"))
    refuses(r"torch\.no_grad", hidden, weight, hidden_t.clone().requires_grad_(), weight_t, mask)
    refuses("reduction", *fits, mask, reduction="batchmean")
    refuses("num_items_in_batch", *fits, mask, reduction="none", num_items_in_batch=3)
    refuses("max_rows", *fits, mask, max_rows=0)
