import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches

from liger_trainer.kernels.logits.cross_entropy import cross_entropy
from liger_trainer.kernels.logits.loss import LossOptions, cross_entropy_reference

OPTIONS = {
    "plain": LossOptions(),
    "smoothed": LossOptions(label_smoothing=0.1),
    "z_loss": LossOptions(z_loss=1e-2),
    "softcap": LossOptions(softcap=5.0),
    "scaled": LossOptions(scale=0.25),
    "everything": LossOptions(-1, 0.2, 1e-2, 0.5, 4.0),
}


def problem(device, dtype=torch.float32, tokens=9, vocab=77, ignore_index=-100):
    logits = (torch.randn(tokens, vocab) * 3).to(device, dtype)
    labels = torch.randint(0, vocab, (tokens,)).to(device)
    labels[::4] = ignore_index
    return logits, labels


def denominator(labels, class_weight, ignore_index):
    kept = labels[labels != ignore_index]
    return len(kept) if class_weight is None else class_weight[kept].sum()


def compare(device, dtype, options, weighted, reduction):
    logits, labels = problem(device, dtype, tokens=6, ignore_index=options.ignore_index)
    class_weight = torch.rand(logits.shape[1], device=device) + 0.5 if weighted else None

    def reference(logits):
        loss = cross_entropy_reference(logits, labels, class_weight, options)
        if reduction == "none":
            return loss
        total = denominator(labels, class_weight, options.ignore_index)
        return loss.sum() / (total if reduction == "mean" else 1)

    def candidate(logits):
        return cross_entropy(
            logits, labels, class_weight=class_weight, reduction=reduction, options=options
        )

    assert_matches(candidate, reference, {"logits": logits})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("weighted", [False, True])
def test_options_match_fp64(kernel_device, options, weighted):
    compare(kernel_device, torch.float32, options, weighted, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_match_fp64(kernel_device, dtype, weighted, reduction):
    compare(kernel_device, dtype, OPTIONS["everything"], weighted, reduction)


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(label_smoothing=0.3)])
@pytest.mark.parametrize("shift", [8192.0, -8192.0])
def test_a_shift_of_all_logits_changes_nothing(kernel_device, options, shift):
    """Multiples of 1/256 are exact before and after; a sum of shift and log-sum would not be."""
    logits, labels = problem(kernel_device)
    logits = (logits * 256).round() / 256
    found = []
    for x in (logits, logits + shift):
        leaf = x.requires_grad_()
        loss = cross_entropy(leaf, labels, reduction="none", options=options)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_masked_classes(kernel_device, smoothing):
    """Logits of -inf, at the label in the second row."""
    logits, labels = problem(kernel_device, tokens=3)
    labels[:] = torch.tensor([3, 5, 7])
    logits[:, 5] = -math.inf
    loss = cross_entropy(
        logits, labels, reduction="none", options=LossOptions(label_smoothing=smoothing)
    )
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    )


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(label_smoothing=0.3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_torch(kernel_device, options, reduction, weighted):
    logits, labels = problem(kernel_device)
    class_weight = torch.rand(logits.shape[1], device=kernel_device) if weighted else None
    expected = F.cross_entropy(
        logits, labels, class_weight, reduction=reduction, label_smoothing=options.label_smoothing
    )
    got = cross_entropy(
        logits, labels, class_weight=class_weight, reduction=reduction, options=options
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_at_the_true_class_keeps_its_precision(kernel_device, probability, dtype):
    vocab = 64
    odds = torch.tensor(probability / (1 - probability) * (vocab - 1))
    logits = torch.zeros(1, vocab, device=kernel_device, dtype=dtype)
    logits[0, 3] = odds.log()
    labels = torch.tensor([3], device=kernel_device)
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, labels).backward()
    truth = logits.double().softmax(-1)[0, 3] - 1
    tolerance = 2e-3 if dtype == torch.float32 else 4e-3
    assert abs(leaf.grad[0, 3].double() / truth - 1) < tolerance


def test_without_any_label_loss_and_gradient_are_zero(kernel_device):
    logits, labels = problem(kernel_device)
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not leaf.grad.any()


def test_token_weights_and_num_items(kernel_device):
    logits, labels = problem(kernel_device)
    weight = torch.rand(labels.shape, device=kernel_device)
    losses = cross_entropy(logits, labels, reduction="none")
    got = cross_entropy(logits, labels, token_weight=weight, num_items_in_batch=5)
    torch.testing.assert_close(got, (losses * weight).sum() / 5)


def test_fp64_stays_fp64_in_every_weight(device):
    logits = torch.randn(300, 7, dtype=torch.float64, device=device)
    labels = torch.randint(0, 7, (300,), device=device)
    weights = torch.rand(7, dtype=torch.float64, device=device)
    expected = F.cross_entropy(logits, labels, weight=weights)
    got = cross_entropy(logits, labels, class_weight=weights)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    per_token = torch.rand(300, dtype=torch.float64, device=device)
    expected = (F.cross_entropy(logits, labels, reduction="none") * per_token).sum() / 300
    got = cross_entropy(logits, labels, token_weight=per_token)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_masked_vocabulary_of_minus_infinity(kernel_device):
    logits, labels = problem(kernel_device, vocab=300)
    logits[:, :200] = -torch.inf
    labels = labels.where(labels == -100, 250)
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, labels)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert torch.isfinite(leaf.grad).all()


def test_any_strides_and_shapes(kernel_device):
    logits = torch.randn(2, 40, 5, device=kernel_device).transpose(1, 2)
    labels = torch.randint(0, 40, (2, 5), device=kernel_device)
    losses = cross_entropy(logits, labels, reduction="none")
    assert losses.shape == (2, 5)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert cross_entropy(logits[:0], labels[:0], reduction="sum").item() == 0.0


def test_label_out_of_range_is_never_a_silent_number(kernel_device):
    logits, labels = problem(kernel_device)
    labels[1] = logits.shape[1]
    loss = cross_entropy(logits.requires_grad_(), labels)
    assert torch.isnan(loss)
    loss.backward()
    assert torch.isnan(logits.grad[1]).all()
    assert not torch.isnan(logits.grad[2:]).any()


def test_label_out_of_range_on_the_torch_path_raises():
    logits, labels = problem("cpu")
    labels[1] = logits.shape[1]
    with pytest.raises(IndexError):
        cross_entropy(logits, labels)


def test_compiles_to_one_graph_for_all_lengths(kernel_device):
    def step(logits, labels):
        return cross_entropy(logits, labels, options=LossOptions(softcap=7.0))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 12, 31):
        logits, labels = problem(kernel_device, tokens=tokens)
        leaf, twin = (logits.clone().requires_grad_() for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=tokens != 9):
            compiled(leaf, labels).backward()
        step(twin, labels).backward()
        torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"softcap": 0.0}, "softcap"),
        ({"softcap": float("inf")}, "softcap"),
        ({"scale": float("inf")}, "scale"),
    ],
)
def test_refuses_options_without_meaning(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LossOptions(), **change)


def test_refuses_input_that_does_not_fit():
    logits, labels = problem("cpu")
    with pytest.raises(ValueError, match="shape"):
        cross_entropy(logits, labels[:-1])
    with pytest.raises(ValueError, match="int64"):
        cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(logits, labels, reduction="average")
    with pytest.raises(ValueError, match="num_items_in_batch divides a sum"):
        cross_entropy(logits, labels, reduction="none", num_items_in_batch=3)
    with pytest.raises(ValueError, match="floating"):
        cross_entropy(logits.long(), labels)
    with pytest.raises(ValueError, match="class_weight"):
        cross_entropy(logits, labels, class_weight=torch.ones(3))
    with pytest.raises(ValueError, match="token_weight"):
        cross_entropy(logits, labels, token_weight=torch.ones(3))


def test_class_weights_are_constants():
    logits, labels = problem("cpu")
    class_weight = torch.rand(logits.shape[1], requires_grad=True)
    with pytest.raises(ValueError, match="class_weight requires a gradient"):
        cross_entropy(logits, labels, class_weight=class_weight)
    with torch.no_grad():
        cross_entropy(logits, labels, class_weight=class_weight)


def test_class_weights_of_any_stride(kernel_device):
    logits, labels = problem(kernel_device)
    strided = torch.rand(logits.shape[1], 2, device=kernel_device)[:, 0]
    got = cross_entropy(logits, labels, class_weight=strided)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels, strided))


@pytest.mark.gpu
def test_above_two_to_the_31_elements():
    rows, vocab = 16500, 131072
    logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    leaf = logits.requires_grad_()
    cross_entropy(leaf, labels, reduction="sum").backward()
    last = logits[-2:].detach().requires_grad_()
    F.cross_entropy(last.float(), labels[-2:], reduction="sum").backward()
    torch.testing.assert_close(leaf.grad[-2:], last.grad)
