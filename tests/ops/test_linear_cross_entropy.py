import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches
from shapes import Shapes

from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.kernels.linear.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from liger_trainer.kernels.logits.loss import LossOptions

TOKENS, WIDTH, VOCAB, FIRST = 20, 16, 50, 4
ROWS = {"one workspace": 32, "several workspaces": 8}
ALL = LossOptions(label_smoothing=0.1, z_loss=1e-2, scale=0.5, softcap=5.0)


@pytest.fixture(autouse=True)
def _small_first_part(monkeypatch):
    """Make the part that is queued before the token count is known small, like these problems."""
    monkeypatch.setattr(linear_head, "FIRST_ROWS", FIRST)


def problem(device, dtype=torch.float32, ignored=3, tokens=TOKENS):
    tensors = {
        "hidden": torch.randn(tokens, WIDTH).to(device, dtype),
        "weight": torch.randn(VOCAB, WIDTH).to(device, dtype),
        "bias": torch.randn(VOCAB).to(device, dtype),
    }
    labels = torch.randint(0, VOCAB, (tokens,)).to(device)
    if ignored:
        labels[::ignored] = -100
    return tensors, labels


def reduced(loss, labels, reduction, class_weight=None):
    kept = labels[labels != -100]
    total = len(kept) if class_weight is None else class_weight[kept].sum()
    return {"none": lambda: loss, "sum": loss.sum, "mean": lambda: loss.sum() / total}[reduction]()


def compare(device, dtype, rows, reduction, options=ALL, weighted=True):
    tensors, labels = problem(device, dtype)
    class_weight = torch.rand(VOCAB, device=device) + 0.5 if weighted else None

    def reference(hidden, weight, bias):
        loss = linear_cross_entropy_reference(
            [hidden], [weight], labels, bias, class_weight, options
        )
        return reduced(loss, labels, reduction, class_weight)

    def candidate(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias, class_weight=class_weight, reduction=reduction,
            options=options, max_rows=rows,
        )  # fmt: skip

    # The rows of hidden are rounded once more when g scales them: see the module's docstring.
    assert_matches(candidate, reference, tensors, factor=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_matches_fp64(kernel_device, dtype, rows, reduction):
    compare(kernel_device, dtype, rows, reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", [LossOptions(), ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class weights"])
def test_options_match_fp64(kernel_device, reduction, options, weighted):
    rows = ROWS["several workspaces"]
    compare(kernel_device, torch.bfloat16, rows, reduction, options, weighted)


@pytest.mark.parametrize("ignored", [0, 1, 7])
@pytest.mark.parametrize("rows", [3, FIRST, 8, 32])
@pytest.mark.parametrize("tokens", [1, FIRST + 1, TOKENS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_supervised_tokens(kernel_device, ignored, rows, tokens, reduction):
    tensors, labels = problem(kernel_device, ignored=ignored, tokens=tokens)
    count = max(1, int((labels != -100).sum()))

    def reference(hidden, weight, bias):
        losses = linear_cross_entropy_reference([hidden], [weight], labels, bias)
        return losses if reduction == "none" else losses.sum() / count

    def candidate(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, max_rows=rows
        )

    assert_matches(candidate, reference, tensors, factor=3.0)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_low_rank_adapter_is_a_second_term(kernel_device, rows, reduction):
    tensors, labels = problem(kernel_device)
    tensors["low"] = torch.randn(TOKENS, 4, device=kernel_device)
    tensors["adapter"] = torch.randn(VOCAB, 4, device=kernel_device)

    def reference(hidden, weight, bias, low, adapter):
        loss = linear_cross_entropy_reference([hidden, low], [weight, adapter], labels, bias)
        return reduced(loss, labels, reduction)

    def candidate(hidden, weight, bias, low, adapter):
        return linear_cross_entropy(
            [hidden, low], [weight, adapter], labels, bias, reduction=reduction, max_rows=rows
        )

    assert_matches(candidate, reference, tensors, factor=3.0)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
def test_token_weights(kernel_device, rows, learned):
    tensors, labels = problem(kernel_device)
    token_weight = torch.rand(TOKENS, device=kernel_device)
    if learned:
        tensors["token_weight"] = token_weight

    def reference(hidden, weight, bias, token_weight=token_weight):
        loss = linear_cross_entropy_reference([hidden], [weight], labels, bias)
        return (loss * token_weight).sum() / 11

    def candidate(hidden, weight, bias, token_weight=token_weight):
        return linear_cross_entropy(
            hidden, weight, labels, bias, token_weight=token_weight, num_items_in_batch=11,
            max_rows=rows,
        )  # fmt: skip

    assert_matches(candidate, reference, tensors, factor=3.0)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("uniform", [True, False])
def test_token_weights_in_fp64(device, rows, uniform):
    tensors, labels = problem(device, torch.float64)
    weights = torch.rand(TOKENS, dtype=torch.float64, device=device)
    weights.requires_grad_(not uniform)
    hidden, weight = tensors["hidden"], tensors["weight"]
    losses = linear_cross_entropy_reference([hidden], [weight], labels)
    loss = linear_cross_entropy(
        hidden, weight, labels, token_weight=weights, reduction="sum", max_rows=rows
    )
    torch.testing.assert_close(loss, losses @ weights, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_fp32_weight_with_16_bit_hidden_gets_an_fp32_gradient(kernel_device, rows):
    tensors, labels = problem(kernel_device, torch.bfloat16)
    weight = tensors["weight"].float().requires_grad_()
    linear_cross_entropy(tensors["hidden"], weight, labels, max_rows=rows).backward()
    exact = tensors["weight"].double().requires_grad_()
    count = (labels != -100).sum()
    loss = linear_cross_entropy_reference([tensors["hidden"].double()], [exact], labels)
    (loss.sum() / count).backward()
    assert weight.grad.dtype == torch.float32
    error = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02


def test_weight_gradient_does_not_lose_precision_with_many_workspaces(device):
    """Accumulated in fp32: a hundred workspaces are as good as one."""
    tokens = 6400
    hidden = torch.randn(tokens, WIDTH).to(device, torch.bfloat16)
    weight = (torch.randn(VOCAB, WIDTH) * 0.1).to(device, torch.bfloat16)
    labels = torch.randint(0, VOCAB, (tokens,), device=device)

    def gradient(rows):
        leaf = weight.clone().requires_grad_()
        linear_cross_entropy(hidden, leaf, labels, reduction="sum", max_rows=rows).backward()
        return leaf.grad.double()

    exact = weight.double().requires_grad_()
    linear_cross_entropy_reference([hidden.double()], [exact], labels).sum().backward()
    many, one = ((gradient(rows) - exact.grad).norm() for rows in (64, tokens))
    assert many < 1.5 * one


def test_without_any_label_loss_and_gradients_are_zero(kernel_device):
    tensors, labels = problem(kernel_device)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for reduction, rows in itertools.product(("mean", "sum"), ROWS.values()):
        hidden, weight, bias = leaves
        loss = linear_cross_entropy(
            hidden, weight, torch.full_like(labels, -100), bias, reduction=reduction, max_rows=rows
        )
        loss.backward()
        assert loss.item() == 0.0
        assert not any(leaf.grad.any() for leaf in leaves)


def test_never_builds_all_logits(device):
    tensors, labels = problem(device, ignored=0)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with Shapes() as shapes:
        loss = linear_cross_entropy(labels=labels, max_rows=16, **leaves)
        loss.backward()
    assert 0 < shapes.largest(VOCAB) <= 16


def test_ignored_tokens_cost_nothing(device):
    tensors, labels = problem(device)
    labels[:] = -100
    labels[5:9] = 3
    with Shapes() as shapes:
        linear_cross_entropy(labels=labels, **tensors)
    # Beside the empty workspace and the transposed weight:
    computed = {s[0] for s in shapes.seen if len(s) == 2 and s[1] == VOCAB} - {TOKENS, WIDTH}
    assert computed
    assert max(computed) <= 8


def test_frozen_head_allocates_no_weight_gradient(device):
    tensors, labels = problem(device)
    hidden = tensors["hidden"].requires_grad_()
    with Shapes() as shapes:
        linear_cross_entropy(hidden, tensors["weight"], labels, max_rows=16).backward()
    assert hidden.grad.any()
    assert torch.Size((VOCAB, WIDTH)) not in shapes.seen


def test_backward_twice_gives_the_same(kernel_device):
    tensors, labels = problem(kernel_device)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for rows in ROWS.values():
        loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], max_rows=rows)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(map(torch.equal, first, second))


def test_labels_out_of_range_raise(kernel_device):
    tensors, labels = problem(kernel_device, tokens=FIRST)
    labels[1] = VOCAB
    hidden = tensors["hidden"].requires_grad_()
    loss = linear_cross_entropy(hidden, tensors["weight"], labels)
    assert torch.isnan(loss)  # too few tokens for the host to have read anything yet
    with pytest.raises(ValueError, match="1 labels lie outside"):
        loss.backward()


def test_labels_out_of_range_raise_at_once_where_the_count_is_read(kernel_device):
    tensors, labels = problem(kernel_device)
    labels[1] = -7
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        linear_cross_entropy(tensors["hidden"], tensors["weight"], labels)


@pytest.mark.parametrize(
    ("reduction", "rows"), [("mean", 32), ("mean", 8), ("none", 8)], ids=["kept", "summed", "again"]
)
def test_compiles_to_one_graph_for_all_lengths(kernel_device, rows, reduction):
    """Whether the gradient of the logits is kept, or d weight is summed, or both are made later."""

    def step(hidden, weight, labels, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, max_rows=rows
        ).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 22, 25):
        tensors, labels = problem(kernel_device, tokens=tokens)
        leaves = [t.requires_grad_() for t in tensors.values()]
        with torch._dynamo.config.patch(error_on_recompile=tokens != 20):
            got = torch.autograd.grad(compiled(leaves[0], leaves[1], labels, leaves[2]), leaves)
        expected = torch.autograd.grad(step(leaves[0], leaves[1], labels, leaves[2]), leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_adapter_of_another_dtype_is_that_of_eager_code(device):
    """Compiled code takes the dtype of a gradient from what the operator declares."""
    tensors, labels = problem(device, torch.bfloat16)
    tensors["down"] = torch.randn(TOKENS, 4, device=device)
    tensors["up"] = torch.randn(VOCAB, 4, device=device)

    def step(hidden, weight, bias, down, up):
        return linear_cross_entropy([hidden, down * 2], [weight, up], labels, bias)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


def test_compiles_once_for_all_lengths_with_the_default_workspace(device):
    torch._dynamo.reset()
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (40, 44, 47, 2000):
        tensors, labels = problem(device, tokens=tokens)
        leaves = [t.requires_grad_() for t in tensors.values()]
        with torch._dynamo.config.patch(error_on_recompile=tokens != 40):
            got = torch.autograd.grad(compiled(leaves[0], leaves[1], labels, leaves[2]), leaves)
        loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2])
        for a, b in zip(got, torch.autograd.grad(loss, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_workspaces_are_of_one_size_and_within_the_limit():
    for tokens, limit in [(1, 256), (256, 256), (257, 256), (32768, 8900), (16384, 7760), (5, 3)]:
        plan = linear_head.Plan((True,), (True,), False, True, rows=limit, first=0)
        rows = plan.workspace(tokens)
        assert rows <= limit
        parts = -(-tokens // rows)
        assert parts <= -(-tokens // limit) + (limit < 64)


def test_refuses_operands_that_do_not_fit():
    tensors, labels = problem("cpu")
    hidden, weight, bias = tensors.values()
    with pytest.raises(ValueError, match="does not fit"):
        linear_cross_entropy(hidden[:, :-1], weight, labels)
    with pytest.raises(ValueError, match="labels must have shape"):
        linear_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match="bias"):
        linear_cross_entropy(hidden, weight, labels, bias[:-1])
    with pytest.raises(ValueError, match="1 hidden states for 2"):
        linear_cross_entropy([hidden], [weight, weight], labels)
    with pytest.raises(ValueError, match="floating"):
        linear_cross_entropy(hidden.long(), weight, labels)
    with pytest.raises(ValueError, match="bias must be floating point"):
        linear_cross_entropy(hidden, weight, labels, bias.long())
    with pytest.raises(ValueError, match="share device"):
        linear_cross_entropy([hidden, hidden.to("meta")], [weight, weight.to("meta")], labels)
    with pytest.raises(ValueError, match="num_items_in_batch divides a sum"):
        linear_cross_entropy(hidden, weight, labels, reduction="none", num_items_in_batch=3)
    for rows in (0, -1):
        with pytest.raises(ValueError, match="max_rows must be positive"):
            linear_cross_entropy(hidden, weight, labels, max_rows=rows)


@pytest.mark.gpu
def test_host_never_waits_for_an_idle_device():
    """No synchronizing call; the count arrives by event, behind queued work."""
    tokens, width, vocab = 8192, 512, 32000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[::2] = -100
    linear_cross_entropy(hidden, weight, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_real_sizes(ignored):
    tokens, width, vocab = 6000, 512, 50257
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, width, device="cuda") * 0.05).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[torch.rand(tokens, device="cuda") < ignored] = -100
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    plain = torch.autograd.grad(
        F.cross_entropy((hidden @ weight.t()).float(), labels), (hidden, weight)
    )
    h, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(h @ w.t(), labels), (h, w))
    for a, p, t in zip(got, plain, truth, strict=True):
        assert (a - t).norm() <= 3 * (p - t).norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors_not_on_the_current_one():
    with torch.cuda.device(0):
        results = []
        for device in ("cuda:0", "cuda:1"):
            torch.manual_seed(0)
            tensors, labels = problem(device)
            leaves = {name: t.requires_grad_() for name, t in tensors.items()}
            loss = linear_cross_entropy(labels=labels, max_rows=16, **leaves)
            loss.backward()
            results.append([loss.cpu(), *(t.grad.cpu() for t in leaves.values())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
