import itertools

import pytest
import torch
from distillation import TEACHER_WIDTH, VOCAB, WIDTH, operands, problem, reduced
from shapes import Shapes
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer.kernels.linear import divergence as module
from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.kernels.linear.divergence import (
    linear_divergence,
    linear_divergence_reference,
)
from liger_trainer.kernels.linear.workspace import workspace_rows


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_never_builds_all_logits(device, reduction):
    student, teacher, mask = problem(device, dropped=0)
    for tensor in student.values():
        tensor.requires_grad_()
    with Shapes() as shapes:
        values, _ = linear_divergence(
            *operands(student, teacher, mask), student["bias"], reduction=reduction, max_rows=6
        )
        values.sum().backward()
    # A product with a weight transposes it: [H, V].
    tall = {s for s in shapes.seen if len(s) == 2 and s[1] == VOCAB} - {
        torch.Size((width, VOCAB)) for width in (WIDTH, TEACHER_WIDTH)
    }
    assert tall
    assert max(s[0] for s in tall) <= 6


def test_tokens_left_out_cost_nothing(device, monkeypatch):
    monkeypatch.setattr(linear_head, "FIRST_ROWS", 4)
    student, teacher, mask = problem(device)
    mask[:] = False
    mask[5:9] = True
    with Shapes() as shapes:
        linear_divergence(*operands(student, teacher, mask))
    # Beside the transposed weights:
    computed = {s[0] for s in shapes.seen if len(s) == 2 and s[1] == VOCAB}
    assert max(computed - {WIDTH, TEACHER_WIDTH}) == 4


def test_two_workspaces_share_the_budget_of_one():
    def tensor(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    tokens, vocab = 10**6, 32000
    for student, teacher in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        hidden, weight = tensor(tokens, 8, dtype=student), tensor(vocab, 8, dtype=student)
        alone = workspace_rows(tokens, vocab, 8, hidden) * hidden.element_size()
        other = tensor(tokens, 8, dtype=teacher)
        heads = (linear_head.LinearHead([x], [weight]) for x in (hidden, other))
        rows = module._shared_rows(tokens, *heads)
        both = rows * (student.itemsize + teacher.itemsize)
        assert 0.95 * alone < both <= alone


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_head_allocates_no_weight_gradient(device, reduction):
    student, teacher, mask = problem(device)
    hidden = student["hidden"].requires_grad_()
    with Shapes() as shapes:
        values, _ = linear_divergence(
            *operands(student, teacher, mask), reduction=reduction, max_rows=6
        )
        values.sum().backward()
    assert hidden.grad.any()
    assert torch.Size((VOCAB, WIDTH)) not in shapes.seen


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_hidden_states_get_no_gradient(device, reduction):
    student, teacher, mask = problem(device)
    weight = student["weight"].requires_grad_()
    values, _ = linear_divergence(*operands(student, teacher, mask), reduction=reduction)
    values.sum().backward()
    exact = weight.detach().clone().requires_grad_()
    expected = linear_divergence_reference(
        [student["hidden"]], [exact], *([t] for t in list(teacher.values())[:2])
    )[0]
    reduced(expected, mask, reduction).sum().backward()
    torch.testing.assert_close(weight.grad, exact.grad)
    assert student["hidden"].grad is None


PRODUCTS = {  # matrix products of the student and of the teacher, as the module's docstring says
    ("mean", "trainable"): (3, 1), ("mean", "frozen"): (2, 1), ("mean", "no grad"): (1, 1),
    ("none", "trainable"): (4, 2), ("none", "frozen"): (2, 1), ("none", "no grad"): (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS, ids="-".join)
def test_costs_the_products_that_it_says(device, case):
    reduction, head = case
    student, teacher, mask = problem(device)
    student["hidden"].requires_grad_(head != "no grad")
    student["weight"].requires_grad_(head == "trainable")
    with Products() as products:
        values, _ = linear_divergence(*operands(student, teacher, mask), reduction=reduction)
        if values.requires_grad:
            values.sum().backward()
    assert (products.of(WIDTH), products.of(TEACHER_WIDTH)) == PRODUCTS[case]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append({n for t in args[-2:] for n in t.shape})
        return func(*args, **(kwargs or {}))

    def of(self, width: int) -> int:
        return sum(width in shape for shape in self.shapes)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weight_gradient_does_not_lose_precision_with_many_workspaces(device, reduction):
    """Accumulated in fp32: a hundred workspaces are as good as one."""
    tokens = 1600
    student, teacher, mask = problem(device, torch.bfloat16, tokens=tokens, dropped=0)
    teacher = [teacher["teacher_hidden"], teacher["teacher_weight"] * 0.1]
    weight = student["weight"] * 0.1

    def gradient(rows):
        leaf = weight.clone().requires_grad_()
        values = linear_divergence(
            student["hidden"], leaf, *teacher, mask, reduction=reduction, max_rows=rows
        )[0]
        values.sum().backward()
        return leaf.grad.double()

    exact = weight.double().requires_grad_()
    hidden_t, weight_t = (t.double() for t in teacher)
    linear_divergence_reference(
        [student["hidden"].double()], [exact], [hidden_t], [weight_t]
    )[0].sum().backward()  # fmt: skip
    many, one = ((gradient(rows) - exact.grad).norm() for rows in (32, tokens))
    assert many < 1.5 * one


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_host_never_waits_for_an_idle_device(reduction):
    """No synchronizing call; the count arrives by event, behind queued work."""
    tokens, width, vocab = 8192, 512, 32000
    hidden, hidden_t = torch.randn(2, tokens, width, device="cuda", dtype=torch.bfloat16)
    weight, weight_t = torch.randn(2, vocab, width, device="cuda", dtype=torch.bfloat16)
    weight.requires_grad_()
    mask = torch.rand(tokens, device="cuda") < 0.5
    inputs = hidden.requires_grad_(), weight, hidden_t, weight_t, mask
    linear_divergence(*inputs, reduction=reduction)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_divergence(*inputs, reduction=reduction)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
