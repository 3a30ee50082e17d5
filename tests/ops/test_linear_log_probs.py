import heads
import pytest
import torch
from heads import FIRST, TOKENS, VOCAB, WIDTH, assert_all_close, every_rows, leaves_of, problem
from oracle import assert_matches

from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.kernels.linear.log_probs import (
    linear_log_probs,
    linear_log_probs_reference,
)
from liger_trainer.kernels.logits.log_probs import score, score_gradient_
from liger_trainer.kernels.logits.scores import (
    EXTRA,
    ScoreGradients,
    ScoreOptions,
    log_probs_reference,
)

small_first_part = heads.small_first_part  # a fixture

BOTH = ("entropy", "log_sum_exp")
ALL = ScoreOptions(scale=0.5, softcap=4.0, temperature=1.3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(scores, leaves, fn=None):
    """Of a loss in which every token counts differently, in all outputs that carry gradients."""
    if fn is None:
        carrying = [x for x in scores if x is not None and x.requires_grad]
        fn = sum(((i + 2) * x).sin().sum() for i, x in enumerate(carrying))
    return torch.autograd.grad(fn, list(leaves.values()))


@every_rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "outputs"), [(ScoreOptions(), ()), (ALL, BOTH)], ids=["plain", "everything"]
)
def test_matches_fp64(place, dtype, rows, options, outputs):
    tensors, labels = problem(place, dtype)

    def pick(scores):
        return [scores.log_probs, *(getattr(scores, name) for name in outputs)]

    def reference(hidden, weight, bias):
        return pick(linear_log_probs_reference([hidden], [weight], labels, bias, options, outputs))

    def candidate(hidden, weight, bias):
        return pick(
            linear_log_probs(
                hidden, weight, labels, bias, outputs=outputs, options=options, max_rows=rows
            )
        )

    # The largest of few errors is a matter of luck: twice torch's is at times too little.
    assert_matches(candidate, reference, tensors, factor=4.0)


@pytest.mark.parametrize("options", [ScoreOptions(), ALL], ids=["plain", "all options"])
def test_gradient_in_place_is_that_of_autograd(place, options):
    """Also of rows without label, whatever gradient arrives there."""
    logits = torch.randn(TOKENS, VOCAB, device=place)
    labels = torch.randint(0, VOCAB, (TOKENS,), device=place)
    labels[::3] = -100
    leaf = logits.clone().requires_grad_()
    expected = log_probs_reference(leaf, labels, options, BOTH)
    seeds = [torch.randn(TOKENS, device=place) for _ in range(3)]
    torch.autograd.backward(expected[:3], seeds)
    scores, normalizer = score(logits, labels, options, BOTH)
    grads = ScoreGradients(*seeds)
    score_gradient_(logits, labels, normalizer, scores.entropy, grads, options)
    torch.testing.assert_close(logits, leaf.grad)
    assert not logits[::3].any()


@every_rows
@pytest.mark.parametrize("shift", [8192.0, -8192.0])
def test_a_shift_of_all_logits_costs_no_precision(place, rows, shift):
    """Multiples of 1/256 are exact before and after; a sum of shift and log-sum would not be."""
    tensors, labels = problem(place)
    tensors = {name: (x * 16).round() / 16 for name, x in tensors.items()}
    found = []
    for by in (0.0, shift):
        leaves = leaves_of(tensors | {"bias": tensors["bias"] + by})
        scores = linear_log_probs(
            leaves["hidden"], leaves["weight"], labels, leaves["bias"],
            outputs=BOTH, max_rows=rows,
        )  # fmt: skip
        loss = (scores.log_probs + 2 * scores.entropy + 3 * scores.log_sum_exp).sum()
        found.append((scores.log_probs, scores.entropy, *gradients(scores, leaves, loss)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weighting", [None, "uniform"])
@pytest.mark.parametrize("ignored", [0, 1, 2])
@pytest.mark.parametrize("rows", [3, 5, 16])
def test_any_number_of_tokens_and_labels(place, ignored, rows, weighting):
    for tokens in (0, 1, FIRST + 1, TOKENS):
        tensors, labels = problem(place, ignored=ignored, tokens=tokens)
        got, expected = leaves_of(tensors), leaves_of(tensors)
        scores = linear_log_probs(labels=labels, weighting=weighting, max_rows=rows, **got)
        wanted = linear_log_probs_reference(
            [expected["hidden"]], [expected["weight"]], labels, expected["bias"]
        )
        torch.testing.assert_close(scores.log_probs, wanted.log_probs)
        if weighting:
            results = [gradients(s, x, s.log_probs.mul(3).sum())
                       for s, x in ((scores, got), (wanted, expected))]  # fmt: skip
        else:
            results = [gradients(s, x) for s, x in ((scores, got), (wanted, expected))]
        assert_all_close(*results, rtol=1e-4, atol=1e-5)


@every_rows
@pytest.mark.parametrize("grad", [False, True])
def test_every_score(place, rows, grad):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors) if grad else tensors
    scores = linear_log_probs(labels=labels, outputs=EXTRA, options=ALL, max_rows=rows, **leaves)
    expected = linear_log_probs_reference(
        [tensors["hidden"]], [tensors["weight"]], labels, tensors["bias"], ALL, EXTRA
    )
    for name, got in scores._asdict().items():
        torch.testing.assert_close(got.detach(), getattr(expected, name), msg=name)
    carry = {name for name, x in scores._asdict().items() if x.requires_grad}
    assert carry == ({"log_probs", *BOTH} if grad else set())


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_low_rank_adapter_is_a_second_term(place, rows, weighting):
    tensors, labels = problem(place)
    tensors["low"] = torch.randn(TOKENS, 3, device=place)
    tensors["adapter"] = torch.randn(VOCAB, 3, device=place)

    def total(log_probs):
        return log_probs.sum() if weighting else log_probs

    def reference(hidden, weight, bias, low, adapter):
        return total(
            linear_log_probs_reference([hidden, low], [weight, adapter], labels, bias).log_probs
        )

    def candidate(hidden, weight, bias, low, adapter):
        scores = linear_log_probs(
            [hidden, low], [weight, adapter], labels, bias, weighting=weighting, max_rows=rows
        )
        return total(scores.log_probs)

    assert_matches(candidate, reference, tensors, factor=3.0)


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform"])
@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")]
)
def test_only_what_requires_a_gradient_gets_one(place, rows, wanted, weighting):
    tensors, labels = problem(place)

    def gradient_of(names):
        leaves = leaves_of(tensors)
        for name in set(leaves) - set(names):
            leaves[name].requires_grad_(False)
        scores = linear_log_probs(labels=labels, weighting=weighting, max_rows=rows, **leaves)
        scores.log_probs.sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    got, everything = gradient_of(wanted), gradient_of(tensors)
    for name, grad in got.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            assert grad.any()
            torch.testing.assert_close(grad, everything[name])


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_fp32_parameters_with_16_bit_hidden_get_fp32_gradients(place, rows, weighting):
    tensors, labels = problem(place, torch.bfloat16)
    leaves = leaves_of({**tensors, "weight": tensors["weight"].float()})
    leaves["bias"] = tensors["bias"].float().requires_grad_()
    scores = linear_log_probs(labels=labels, weighting=weighting, max_rows=rows, **leaves)
    scores.log_probs.sum().backward()
    exact = leaves_of({name: t.double() for name, t in tensors.items()})
    linear_log_probs_reference(
        [exact["hidden"]], [exact["weight"]], labels, exact["bias"]
    ).log_probs.sum().backward()
    for name, dtype in {"hidden": torch.bfloat16, "weight": torch.float32}.items():
        assert leaves[name].grad.dtype == dtype
        error = (leaves[name].grad - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 0.02, name
    assert leaves["bias"].grad.dtype == torch.float32


@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_weight_gradient_does_not_lose_precision_with_many_workspaces(device, weighting):
    """Accumulated in fp32: a hundred workspaces are as good as one."""
    tokens = 6400
    hidden = torch.randn(tokens, WIDTH).to(device, torch.bfloat16)
    weight = (torch.randn(VOCAB, WIDTH) * 0.1).to(device, torch.bfloat16)
    labels = torch.randint(0, VOCAB, (tokens,), device=device)

    def gradient(rows):
        leaf = weight.clone().requires_grad_()
        scores = linear_log_probs(hidden, leaf, labels, weighting=weighting, max_rows=rows)
        scores.log_probs.sum().backward()
        return leaf.grad.double()

    exact = weight.double().requires_grad_()
    linear_log_probs_reference([hidden.double()], [exact], labels).log_probs.sum().backward()
    many, one = ((gradient(rows) - exact.grad).norm() for rows in (64, tokens))
    assert many < 1.5 * one


def test_inputs_of_any_shape_and_stride(place):
    hidden = torch.randn(WIDTH, 4, 3, device=place).permute(2, 1, 0)
    weight = torch.randn(WIDTH, VOCAB, device=place).t()
    labels = torch.randint(0, VOCAB, (4, 3), device=place).t()
    results = []
    for h, w in [(hidden, weight), (hidden.contiguous(), weight.contiguous())]:
        leaves = {"h": h.detach().requires_grad_(), "w": w.detach().requires_grad_()}
        scores = linear_log_probs(*leaves.values(), labels, outputs=BOTH, max_rows=5)
        assert {x.shape for x in scores if x is not None} == {labels.shape}
        results.append([x.detach() for x in scores if x is not None])
        results[-1] += gradients(scores, leaves)
    assert_all_close(*results)


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform", "probability"])
def test_without_any_label_scores_and_gradients_are_zero(place, rows, weighting):
    tensors, labels = problem(place)
    leaves = leaves_of(tensors)
    scores = linear_log_probs(
        labels=torch.full_like(labels, -100), outputs=EXTRA, weighting=weighting, max_rows=rows,
        **leaves,
    )  # fmt: skip
    assert not any(x.any() for x in scores)
    for grad in gradients(scores, leaves, scores.log_probs.sum()):
        assert torch.equal(grad, torch.zeros_like(grad))


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_rows_without_label_are_exactly_zero(place, rows, weighting):
    """Whatever their hidden states hold, and whatever gradient arrives there."""
    tensors, labels = problem(place)
    leaves = leaves_of(tensors)
    scores = linear_log_probs(
        labels=labels, outputs=("argmax",), weighting=weighting, max_rows=rows, **leaves
    )
    ignored = labels == -100
    seed = torch.ones_like(scores.log_probs).masked_fill(ignored, 7.0)
    dhidden, dweight, _ = gradients(scores, leaves, (scores.log_probs * seed).sum())
    assert not scores.log_probs[ignored].any()
    assert not scores.argmax[ignored].any()
    assert not dhidden[ignored].any()
    assert dhidden[~ignored].any(1).all()
    kept = leaves_of({**tensors, "hidden": tensors["hidden"][~ignored]})
    alone = linear_log_probs(labels=labels[~ignored], max_rows=rows, **kept)
    torch.testing.assert_close(dweight, gradients(alone, kept, alone.log_probs.sum())[1])


@every_rows
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_backward_twice_gives_the_same(place, rows, weighting):
    """The first uses up the logits that were kept; the second has to make them again."""
    tensors, labels = problem(place)
    leaves = leaves_of(tensors)
    scores = linear_log_probs(
        labels=labels, outputs=("entropy",), weighting=weighting, max_rows=rows, **leaves
    )
    total = scores.log_probs.sum()
    if not weighting:
        total = total + scores.entropy.square().sum()
    first = torch.autograd.grad(total, leaves.values(), retain_graph=True)
    second = torch.autograd.grad(total, leaves.values())
    assert all(x.any() for x in first)
    assert_all_close(first, second)


@pytest.mark.parametrize("label", [VOCAB, -7])
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_labels_out_of_range_raise_where_the_count_is_read(place, weighting, label):
    tensors, labels = problem(place)
    labels[1] = label
    for leaves in (tensors, leaves_of(tensors)):
        with pytest.raises(ValueError, match=r"1 labels lie outside.*resize_token_embeddings"):
            linear_log_probs(labels=labels, weighting=weighting, **leaves)


@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_labels_out_of_range_raise_at_the_latest_in_backward(kernel_device, weighting):
    """With so few tokens the host has read nothing by the end of forward."""
    tensors, labels = problem(kernel_device, tokens=FIRST)
    labels[1] = VOCAB
    leaves = leaves_of(tensors)
    scores = linear_log_probs(labels=labels, weighting=weighting, **leaves)
    assert scores.log_probs.isnan().nonzero().flatten().tolist() == [1]
    with pytest.raises(ValueError, match="1 labels lie outside"):
        scores.log_probs.sum().backward()


def test_refuses_operands_that_do_not_fit():
    tensors, labels = problem("cpu")
    hidden, weight, bias = tensors.values()
    with pytest.raises(ValueError, match="does not fit"):
        linear_log_probs(hidden[:, :-1], weight, labels)
    with pytest.raises(ValueError, match="labels must have shape"):
        linear_log_probs(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match="int64"):
        linear_log_probs(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="bias"):
        linear_log_probs(hidden, weight, labels, bias[:-1])
    with pytest.raises(ValueError, match="1 hidden states for 2"):
        linear_log_probs([hidden], [weight, weight], labels)
    with pytest.raises(ValueError, match="weighting must be None or one of"):
        linear_log_probs(hidden, weight, labels, weighting="even")
    with pytest.raises(ValueError, match="unknown outputs perplexity"):
        linear_log_probs(hidden, weight, labels, outputs=("perplexity",))


@pytest.mark.gpu
@pytest.mark.parametrize("weighting", [None, "uniform"])
def test_host_never_waits_for_an_idle_device(weighting, monkeypatch):
    """No synchronizing call; the count arrives by event, behind queued work."""
    monkeypatch.setattr(linear_head, "FIRST_ROWS", 1024)
    tokens, width, vocab = 8192, 512, 32000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[::2] = -100

    def step():
        scores = linear_log_probs(
            hidden, weight, labels, outputs=EXTRA, weighting=weighting, max_rows=2048
        )
        scores.log_probs.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
