import pytest
import torch
from oracle import assert_close_to_truth, assert_matches

from liger_trainer.kernels.logits.log_probs import log_probs
from liger_trainer.kernels.logits.scores import (
    EXTRA,
    ScoreOptions,
    TokenScores,
    log_probs_reference,
)

OPTIONS = {
    "plain": ScoreOptions(),
    "temperature": ScoreOptions(temperature=1.7),
    "softcap": ScoreOptions(softcap=5.0),
    "everything": ScoreOptions(ignore_index=3, scale=0.5, softcap=4.0, temperature=1.3),
}
DIFFERENTIABLE = {
    "log_probs": (),
    "entropy": ("entropy",),
    "log_sum_exp": ("log_sum_exp",),
    "together": ("entropy", "log_sum_exp"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(device, dtype=torch.float32, tokens=5, vocab=77, ignore_index=-100):
    logits = (torch.randn(tokens, vocab) * 3).to(device, dtype)
    labels = torch.randint(0, vocab, (tokens,)).to(device)
    labels[::3] = ignore_index
    return logits, labels


def formulas(logits_NV, labels_N, options=ScoreOptions()):
    """The scores by definition, in the dtype of the logits but at least fp32; labels in range."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    factor = options.scale / options.temperature
    if options.softcap is None:
        y_NV = logits_NV * factor
    else:
        cap = options.softcap / options.temperature
        y_NV = cap * torch.tanh(logits_NV * (factor / cap))
    lse_N = y_NV.logsumexp(-1)
    log_p_NV = y_NV - lse_N.unsqueeze(1)
    p_NV = log_p_NV.exp()
    kept_N = labels_N != options.ignore_index
    top_N = torch.stack([row.eq(row.max()).nonzero()[0, 0] for row in y_NV.detach()])
    scores = TokenScores(
        log_probs=log_p_NV.gather(1, labels_N.where(kept_N, 0).unsqueeze(1)).squeeze(1),
        entropy=-(p_NV * log_p_NV.where(p_NV > 0, 0.0)).sum(-1),
        log_sum_exp=lse_N,
        log_sum_sq_probs=p_NV.square().sum(-1).log(),
        mean_logits=y_NV.mean(-1),
        argmax=top_N,
        is_top1=top_N == labels_N,
    )
    return scores.map(lambda x: x.where(kept_N, torch.zeros_like(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("outputs", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_matches_fp64(kernel_device, dtype, options, outputs):
    logits, labels = problem(kernel_device, dtype, ignore_index=options.ignore_index)
    compare_gradients(log_probs, logits, labels, outputs, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_reference_matches_fp64(device, dtype, options):
    logits, labels = problem(device, dtype, ignore_index=options.ignore_index)
    compare_gradients(log_probs_reference, logits, labels, ("entropy", "log_sum_exp"), options)


def compare_gradients(fn, logits, labels, outputs=(), options=ScoreOptions()):
    """Values and gradients of what is differentiable among log_probs and `outputs`."""

    def reference(logits):
        scores = formulas(logits, labels, options)
        return [scores.log_probs, *(getattr(scores, name) for name in outputs)]

    def candidate(logits):
        scores = fn(logits, labels, outputs=outputs, options=options)
        return [scores.log_probs, *(getattr(scores, name) for name in outputs)]

    # The largest of few errors in fp32 is a matter of luck: twice torch's is at times too little.
    assert_matches(candidate, reference, {"logits": logits}, factor=4.0)


@pytest.mark.parametrize("wanted", ["log_probs", "entropy", "log_sum_exp"])
def test_gradient_of_one_output_among_all(kernel_device, wanted):
    logits, labels = problem(kernel_device)
    assert_matches(
        lambda logits: getattr(log_probs(logits, labels, outputs=EXTRA), wanted),
        lambda logits: getattr(formulas(logits, labels), wanted),
        {"logits": logits},
    )


def assert_scores(scores, logits, labels, options=ScoreOptions()):
    """Every field of `scores` is as near to the truth as plain torch is."""
    same, truth = (formulas(x, labels, options) for x in (logits, logits.double()))
    for name, got in scores._asdict().items():
        if name in ("argmax", "is_top1"):
            assert torch.equal(got, getattr(same, name)), name
        else:
            assert_close_to_truth(name, got, getattr(same, name), getattr(truth, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("fn", [log_probs, log_probs_reference])
def test_every_score(kernel_device, dtype, options, fn):
    logits, labels = problem(kernel_device, dtype, ignore_index=options.ignore_index)
    labels[1] = logits[1].argmax()
    scores = fn(logits, labels, outputs=EXTRA, options=options)
    assert_scores(scores, logits, labels, options)
    assert scores.is_top1[1]


@pytest.mark.parametrize("name", EXTRA)
def test_every_output_alone(kernel_device, name):
    logits, labels = problem(kernel_device)
    scores = log_probs(logits, labels, outputs=(name,))
    together = log_probs(logits, labels, outputs=EXTRA)
    assert {n for n, x in scores._asdict().items() if x is not None} == {"log_probs", name}
    torch.testing.assert_close(getattr(scores, name), getattr(together, name))


@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 255, 2049, 4096, 9001])
def test_any_vocabulary(kernel_device, vocab):
    """Also of several blocks, where the sums of one are carried over to the next."""
    logits, labels = problem(kernel_device, tokens=3, vocab=vocab)
    top = 40 if vocab > 16 else 1  # two classes far apart leave nothing but rounding
    logits[1] = torch.linspace(-top / 2, top, vocab)  # a new maximum in every block
    logits[2] = logits[1].flip(0)
    labels[2] = vocab - 1
    assert_scores(log_probs(logits, labels, outputs=EXTRA), logits, labels)
    compare_gradients(log_probs, logits, labels, ("entropy", "log_sum_exp"))


def padded(device):
    return torch.randn(6, 100, device=device)[:, :77]


def columns_first(device):
    return torch.randn(77, 6, device=device).t()


def expanded(device):
    return torch.randn(1, 77, device=device).expand(6, 77)


@pytest.mark.parametrize("make", [padded, columns_first, expanded])
def test_logits_of_any_stride(kernel_device, make):
    logits = make(kernel_device)
    labels = torch.randint(0, 77, (6,), device=kernel_device)
    strided = logits.detach().requires_grad_()
    packed = logits.contiguous().detach().requires_grad_()
    before = logits.clone()
    for leaf in (strided, packed):
        scores = log_probs(leaf, labels, outputs=EXTRA)
        carry = {name for name, x in scores._asdict().items() if x.requires_grad}
        assert carry == {"log_probs", "entropy", "log_sum_exp"}
        (scores.log_probs.sum() + scores.entropy.square().sum()).backward()
        assert_scores(scores.map(torch.Tensor.detach), before, labels)
    torch.testing.assert_close(strided.grad, packed.grad)
    assert torch.equal(logits, before), "the caller's logits are not written to"


def test_shapes_and_no_tokens(kernel_device):
    logits = torch.randn(2, 40, 5, device=kernel_device).transpose(1, 2)
    labels = torch.randint(0, 40, (2, 5), device=kernel_device)
    scores = log_probs(logits, labels, outputs=EXTRA)
    assert {x.shape for x in scores} == {labels.shape}
    assert_scores(scores.map(torch.flatten), logits.reshape(10, 40), labels.flatten())
    leaf = logits[:0].detach().requires_grad_()
    empty = log_probs(leaf, labels[:0], outputs=EXTRA)
    assert {x.shape for x in empty} == {(0, 5)}
    empty.log_probs.sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_without_any_label_scores_and_gradients_are_zero(kernel_device):
    logits, labels = problem(kernel_device)
    leaf = logits.requires_grad_()
    scores = log_probs(leaf, torch.full_like(labels, -100), outputs=EXTRA)
    assert not any(x.any() for x in scores)
    (scores.log_probs + scores.entropy + scores.log_sum_exp).sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("fn", [log_probs, log_probs_reference])
@pytest.mark.parametrize("label", [77, -1])
def test_label_out_of_range_is_nan_there_only(kernel_device, fn, label):
    logits, labels = problem(kernel_device)
    leaf, twin = (logits.clone().requires_grad_() for _ in range(2))
    valid = fn(twin, labels, outputs=EXTRA)
    valid.log_probs.sum().backward()
    labels[1] = label
    scores = fn(leaf, labels, outputs=EXTRA)
    assert scores.log_probs.isnan().nonzero().flatten().tolist() == [1]
    assert not scores.is_top1[1]
    for name in set(EXTRA) - {"is_top1"}:
        assert torch.equal(getattr(scores, name), getattr(valid, name)), name
    scores.log_probs.sum().backward()
    other = torch.arange(len(labels), device=kernel_device) != 1
    assert torch.equal(leaf.grad[other], twin.grad[other])
    assert leaf.grad[1].isnan().all(), "no number that could be taken for a gradient"


@pytest.mark.parametrize("fn", [log_probs, log_probs_reference])
@pytest.mark.parametrize("masked", [slice(0, 200), slice(100, 300)], ids=["first", "last"])
def test_masked_vocabulary_of_minus_infinity(kernel_device, fn, masked):
    """As if the masked entries were not there; also where a whole block is masked."""
    logits, labels = problem(kernel_device, vocab=300)
    logits[:, masked] = -torch.inf
    kept = torch.isfinite(logits[0]).nonzero().flatten()
    small = torch.where(labels == -100, labels, labels % len(kept))
    labels = torch.where(labels == -100, labels, kept[labels % len(kept)])
    outputs = ("entropy", "log_sum_exp", "log_sum_sq_probs", "is_top1")

    def gradient_and_scores(logits, labels):
        leaf = logits.detach().clone().requires_grad_()
        scores = fn(leaf, labels, outputs=outputs)
        (scores.log_probs + 2 * scores.entropy + 3 * scores.log_sum_exp).sum().backward()
        return leaf.grad, [x.detach() for x in scores if x is not None]

    grad, scores = gradient_and_scores(logits, labels)
    small_grad, small_scores = gradient_and_scores(logits[:, kept], small)
    torch.testing.assert_close(scores, small_scores)
    torch.testing.assert_close(grad[:, kept], small_grad)
    assert not grad[:, masked].any()


def test_a_masked_first_block_of_a_large_vocabulary(kernel_device):
    logits, labels = problem(kernel_device, tokens=2, vocab=9000)
    logits[1, :5000] = -torch.inf
    labels[1] = 8000
    scores = log_probs(logits, labels, outputs=set(EXTRA) - {"mean_logits"})
    small = log_probs(logits[1:, 5000:], labels[1:] - 5000, outputs=set(EXTRA) - {"mean_logits"})
    assert scores.argmax[1] == small.argmax[0] + 5000
    for name in ("log_probs", "entropy", "log_sum_exp", "log_sum_sq_probs", "is_top1"):
        torch.testing.assert_close(getattr(scores, name)[1:], getattr(small, name))


@pytest.mark.parametrize("fn", [log_probs, log_probs_reference])
@pytest.mark.parametrize("tied", [[7, 9, 26, 49], [7, 9, 7 + 4096, 8999]], ids=["one", "several"])
def test_of_several_largest_logits_the_first_counts(kernel_device, fn, tied):
    """In one block; and in several, at the same place of two of them."""
    logits = torch.randn(4, tied[-1] + 1, device=kernel_device).clamp(max=2.0)
    logits[:, tied] = 3.0
    scores = fn(logits, torch.tensor(tied, device=kernel_device), outputs=("argmax", "is_top1"))
    assert scores.argmax.tolist() == [7] * 4
    assert scores.is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_at_the_true_class_keeps_its_precision(kernel_device, probability, dtype):
    vocab = 64
    odds = torch.tensor(probability / (1 - probability) * (vocab - 1))
    logits = torch.zeros(1, vocab, device=kernel_device, dtype=dtype)
    logits[0, 3] = odds.log()
    labels = torch.tensor([3], device=kernel_device)
    leaf = logits.clone().requires_grad_()
    log_probs(leaf, labels).log_probs.sum().backward()
    truth = 1 - logits.double().softmax(-1)[0, 3]
    tolerance = 2e-3 if dtype == torch.float32 else 4e-3
    assert abs(leaf.grad[0, 3].double() / truth - 1) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
def test_large_logits(kernel_device, dtype, offset):
    logits, labels = problem(kernel_device, dtype)
    logits = logits + offset if offset else logits * 3000
    scores = log_probs(logits, labels, outputs=EXTRA)
    assert all(torch.isfinite(x).all() for x in scores)
    assert_scores(scores, logits, labels)
    compare_gradients(log_probs, logits, labels, ("entropy", "log_sum_exp"))


@pytest.mark.parametrize("wanted", ["log_probs", "entropy", "log_sum_exp"])
@pytest.mark.parametrize("shift", [8192.0, -8192.0])
def test_a_shift_of_all_logits_costs_no_precision(place, shift, wanted):
    """Multiples of 1/256 are exact before and after; a sum of shift and log-sum would not be."""
    logits, labels = problem(place)
    logits = (logits * 256).round() / 256
    found = []
    for x in (logits, logits + shift):
        leaf = x.requires_grad_()
        scores = log_probs(leaf, labels, outputs=(wanted, "entropy", "log_sum_sq_probs"))
        (gradient,) = torch.autograd.grad(getattr(scores, wanted).sum(), leaf)
        found.append((scores.log_probs, scores.entropy, scores.log_sum_sq_probs, gradient))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_fp64_stays_fp64():
    logits, labels = problem("cpu", torch.float64)
    scores = log_probs(logits, labels, outputs=EXTRA)
    for name in ("log_probs", "entropy", "log_sum_exp", "log_sum_sq_probs", "mean_logits"):
        assert getattr(scores, name).dtype == torch.float64
        torch.testing.assert_close(getattr(scores, name), getattr(formulas(logits, labels), name))


def test_backward_twice_gives_the_same(kernel_device):
    logits, labels = problem(kernel_device)
    leaf = logits.requires_grad_()
    scores = log_probs(leaf, labels, outputs=("entropy",))
    total = scores.log_probs.sum() + scores.entropy.sum()
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert first.any()
    assert torch.equal(first, second)


def test_refuses_input_that_does_not_fit(kernel_device):
    logits, labels = problem(kernel_device)
    with pytest.raises(ValueError, match=r"unknown outputs perplexity; known: entropy, .*is_top1"):
        log_probs(logits, labels, outputs=("entropy", "perplexity"))
    with pytest.raises(ValueError, match="shape"):
        log_probs(logits, labels[:-1])
    with pytest.raises(ValueError, match="int64"):
        log_probs(logits, labels.int())
    with pytest.raises(ValueError, match="floating"):
        log_probs(logits.long(), labels)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0.0, -1.0, float("nan"), float("inf"))),
        ("softcap", (0.0,)),
        ("scale", (float("inf"),)),
    ],
)
def test_refuses_options_without_meaning(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            ScoreOptions(**{name: value})


@pytest.mark.gpu
def test_above_two_to_the_31_elements():
    rows, vocab = 16500, 131072
    logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    leaf = logits.requires_grad_()
    scores = log_probs(leaf, labels, outputs=("entropy",))
    (scores.log_probs + scores.entropy).sum().backward()
    last = logits[-2:].detach().requires_grad_()
    expected = log_probs_reference(last, labels[-2:], outputs=("entropy",))
    (expected.log_probs + expected.entropy).sum().backward()
    torch.testing.assert_close(scores.log_probs[-2:], expected.log_probs)
    torch.testing.assert_close(scores.entropy[-2:], expected.entropy)
    torch.testing.assert_close(leaf.grad[-2:], last.grad)
