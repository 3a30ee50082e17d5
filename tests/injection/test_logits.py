"""Deferred logits behave like logits, and cost nothing until they must."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from deferred_head import TOKENS, VOCAB, deferred, labels, linear, operands, plain
from torch import nn

from liger_trainer.deferred import scope
from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.deferred.state import as_scale_and_softcap


@pytest.fixture
def head():
    return operands()


BIAS = torch.linspace(-2.0, 2.0, VOCAB)[None]

# What happens between a head and its loss, in the wild.
PIPELINES = {
    "cast": lambda z: z.float(),
    "scale": lambda z: (z * 0.25).float(),
    "scale from the left": lambda z: 0.25 * z,
    "divide": lambda z: (z / 8.0).float(),
    "bias": lambda z: z + BIAS,
    "bias and softcap": lambda z: torch.tanh((BIAS + z.float()) / 3.0) * 3.0,
    "softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "scaled softcap": lambda z: (3.0 * torch.tanh(z * 0.1 / 3.0)).to(torch.float32),
    "shift": lambda z: torch.cat([z[..., :-1, :], z[..., -1:, :]], 1).contiguous(),
    "index": lambda z: z[torch.tensor([1, 0])],
    "views": lambda z: z.unsqueeze(0).squeeze(0).view(1, *TOKENS, VOCAB).flatten(0, 1),
    "chunk": lambda z: z.chunk(1)[0],
    "split": lambda z: z.split([1, 4], dim=1)[1].split(3, dim=-2)[1],
    "iteration": lambda z: next(iter(z))[None],
}


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES.keys())
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_as_from_plain_logits(head, pipeline, fused, reduction):
    def loss(logits):
        logits = pipeline(logits)
        rows = logits.reshape(-1, VOCAB)
        return F.cross_entropy(rows, labels().view(-1)[-len(rows) :], reduction=reduction).sum()

    got = torch.autograd.grad(loss(deferred(head, fused=fused)), head)
    expected_loss = loss(plain(head))
    torch.testing.assert_close(loss(deferred(head, fused=fused)), expected_loss)
    for a, b in zip(got, torch.autograd.grad(expected_loss, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n in PIPELINES if n != "shift"])
def test_pipelines_are_followed_without_computing_logits(head, name):
    logits = PIPELINES[name](deferred(head))
    assert isinstance(logits, DeferredLogits)
    rows = logits.reshape(-1, VOCAB)
    F.cross_entropy(rows, labels().view(-1)[-len(rows) :]).backward()
    assert logits._value is None


def test_every_option_of_cross_entropy(head):
    weight = torch.rand(VOCAB)
    options = {"weight": weight, "ignore_index": 3, "label_smoothing": 0.2}
    target = labels().view(-1).clamp_min(0)
    got = F.cross_entropy(deferred(head).view(-1, VOCAB), target, **options)
    torch.testing.assert_close(got, F.cross_entropy(plain(head).view(-1, VOCAB), target, **options))


def test_nll_of_log_softmax(head):
    logits = deferred(head)
    got = F.nll_loss(F.log_softmax(logits, dim=-1).view(-1, VOCAB), labels().view(-1))
    torch.testing.assert_close(got, F.cross_entropy(plain(head).view(-1, VOCAB), labels().view(-1)))
    assert logits._value is None


def test_a_label_that_torch_does_not_gather(head):
    """-100 marks tokens without a label in a loss, but is no index."""
    index = labels().unsqueeze(-1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        plain(head).log_softmax(-1).gather(-1, index)
    logits = deferred(head)
    with pytest.raises(ValueError, match="2 labels lie outside"):
        logits.log_softmax(-1).gather(-1, index).sum().backward()
    picked = deferred(head).log_softmax(-1).gather(-1, index.clamp_min(0))
    expected = plain(head).log_softmax(-1).gather(-1, index.clamp_min(0))
    torch.testing.assert_close(picked, expected)


def test_value_is_bit_for_bit_the_plain_one(head):
    assert torch.equal(deferred(head) + 0, plain(head))
    softcapped = torch.tanh(deferred(head).to(torch.bfloat16) / 3) * 3
    assert torch.equal(softcapped + 0, torch.tanh(plain(head).to(torch.bfloat16) / 3) * 3)


def test_metadata_without_value(head):
    logits = deferred(head)
    assert logits.shape == (*TOKENS, VOCAB)
    assert logits.size(-1) == VOCAB
    assert len(logits) == TOKENS[0]
    assert (logits.dtype, logits.device.type, logits.ndim) == (torch.float32, "cpu", 3)
    assert logits.requires_grad
    assert isinstance(logits, torch.Tensor)
    assert logits._value is None


def test_argmax_token_by_token(head):
    logits = deferred(head)
    assert torch.equal(logits.argmax(-1), plain(head).argmax(-1))
    assert torch.equal(torch.argmax(logits[:, 1:], dim=-1), plain(head)[:, 1:].argmax(-1))
    assert logits._value is None


CUTS = {
    "chunk": lambda z: z.chunk(2),
    "chunks that do not divide": lambda z: torch.chunk(z, 3, dim=1),
    "fewer chunks than asked for": lambda z: z.chunk(chunks=4, dim=-2),
    "split": lambda z: torch.split(z, 2, dim=1),
    "sections": lambda z: z.split([1, 1]),
    "unbind": lambda z: z.unbind(1),
    "iteration": tuple,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_pieces_are_deferred_and_are_views(head, cut):
    logits = deferred(head)
    pieces, expected = cut(logits), cut(plain(head))
    assert [p.shape for p in pieces] == [p.shape for p in expected]
    assert [p.stride() for p in pieces] == [p.stride() for p in expected]
    assert all(isinstance(p, DeferredLogits) for p in pieces)
    assert logits._value is None
    assert all(torch.equal(p + 0, e) for p, e in zip(pieces, expected, strict=True))
    last = pieces[-1].detach()
    last.fill_(7.0)
    assert (logits == 7).sum() == last.numel()


@pytest.mark.parametrize("cut", [lambda z: z.chunk(2, -1), lambda z: z.split(4, 2)])
def test_pieces_of_the_vocabulary_are_ordinary(head, cut):
    for got, expected in zip(cut(deferred(head)), cut(plain(head)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("pipeline", ["scale", "softcap"])
@pytest.mark.parametrize("arguments", [{}, {"dim": -1}, {"dim": 2, "keepdim": True}])
def test_mean_to_report(head, pipeline, arguments):
    logits = PIPELINES[pipeline](deferred(head)).detach()
    expected = PIPELINES[pipeline](plain(head).detach()).mean(**arguments)
    torch.testing.assert_close(logits.mean(**arguments), expected)
    assert logits._value is None


def test_mean_over_tokens_or_with_gradient_is_ordinary(head):
    over_tokens = deferred(head).detach().mean(0)
    torch.testing.assert_close(over_tokens, plain(head).detach().mean(0))
    got = torch.autograd.grad(deferred(head).mean(-1).sum(), head)
    for a, b in zip(got, torch.autograd.grad(plain(head).mean(-1).sum(), head), strict=True):
        torch.testing.assert_close(a, b)


def test_other_uses_get_the_value_with_its_gradient(head):
    got = torch.autograd.grad(deferred(head).softmax(-1).square().sum(), head)
    expected = torch.autograd.grad(plain(head).softmax(-1).square().sum(), head)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_look_without_gradients_does_not_cost_the_gradient(head):
    logits = deferred(head)
    with torch.no_grad():
        logits.max()
    grads = torch.autograd.grad(logits.sum(), head)
    torch.testing.assert_close(grads[2], torch.full((VOCAB,), 10.0))


def test_gradient_through_code_that_cannot_be_intercepted(head):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    got = torch.autograd.grad(Double.apply(deferred(head)).sum(), head)
    for a, b in zip(got, torch.autograd.grad(2 * plain(head).sum(), head), strict=True):
        torch.testing.assert_close(a, b)


def test_mask_written_in_place(head):
    """As Chameleon does with its image tokens."""
    with torch.no_grad():
        logits, expected = deferred(head), plain(head)
        for z in (logits, expected):
            z[:, :, [1, 4]] = torch.finfo(z.dtype).min
    got = F.cross_entropy(logits.view(-1, VOCAB), torch.full((10,), 2))
    torch.testing.assert_close(got, F.cross_entropy(expected.view(-1, VOCAB), torch.full((10,), 2)))


def test_in_place_change_reaches_the_views(head):
    def run(logits):
        view = logits[:, 1:]
        logits.mul_(2.0)
        view[:, :, 3] = 0.0
        view.detach()[0, 0, 0] = 5.0
        return torch.autograd.grad(logits.square().sum() + view.sum(), head)

    for a, b in zip(run(deferred(head)), run(plain(head) * 1.0), strict=True):
        torch.testing.assert_close(a, b)


CHANGES = {
    "in place": lambda hidden, weight, _: weight.add_(1.0),
    "through data": lambda hidden, weight, _: weight.data.add_(1.0),
    "one row through data": lambda hidden, weight, _: weight.data[7].add_(1.0),
    "one column through data": lambda hidden, weight, _: weight.data[:, 3].add_(1.0),
    "two rows exchanged": lambda hidden, weight, _: weight.data.copy_(
        weight[[1, 0, *range(2, 11)]]
    ),
    "one bias through data": lambda hidden, _, bias: bias.data[3].add_(1.0),
    "data exchanged": lambda hidden, weight, _: setattr(weight, "data", weight + 1.0),
    "hidden states": lambda hidden, *_: hidden.mul_(2.0),
    "hidden states through data": lambda hidden, *_: hidden.data[1, 2].mul_(2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_read_after_the_weights_changed_are_refused(head, change):
    logits = deferred(head)
    with torch.no_grad():
        change(*head)
    with pytest.raises(RuntimeError, match="have changed since"):
        logits.sum()
    with pytest.raises(RuntimeError, match="have changed since"):
        F.cross_entropy(logits.view(-1, VOCAB), labels().view(-1))


@pytest.mark.parametrize("before", [True, False])
def test_logits_read_after_the_weights_were_frozen_or_unfrozen(head, before):
    """Their gradient would not be that of the forward; their values are."""
    head[1].requires_grad_(before)
    logits = deferred(head)
    head[1].requires_grad_(not before)
    with pytest.raises(RuntimeError, match="frozen or unfrozen since"):
        logits.sum()
    with torch.no_grad():
        assert torch.equal(logits + 0, plain(head))


def test_fp64_is_given_to_whoever_asks_for_it(head):
    def loss(logits):
        return F.cross_entropy(logits.double().view(-1, VOCAB), labels().view(-1))

    got, expected = loss(deferred(head)), loss(plain(head))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "factors", [(1e30,), (1e30, 1e30, 1e-30, 1e-30), (1e-30, 1e-30, 1e30, 1e30)]
)
def test_factors_that_overflow_do_so_where_they_do_in_torch(head, factors):
    def loss(logits):
        for factor in factors:
            logits = logits * factor
        return F.cross_entropy(logits.view(-1, VOCAB), labels().view(-1))

    torch.testing.assert_close(loss(deferred(head)), loss(plain(head)), equal_nan=True)


def test_a_function_around_torchs_own_is_applied_once(head, monkeypatch):
    """As by a profiler, which replaces `F.cross_entropy` by one that calls it."""
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: 2 * original(*args))
    got, expected = (F.cross_entropy(z.view(-1, VOCAB), labels().view(-1))
                     for z in (deferred(head), plain(head)))  # fmt: skip
    torch.testing.assert_close(got, expected)


def test_low_rank_adapter_joins_the_head(head):
    low = torch.randn(*TOKENS, 3, requires_grad=True)
    adapter = nn.Parameter(torch.randn(VOCAB, 3))
    base, lora = linear(*head[1:]), linear(adapter, None)
    with scope.recording():
        logits = base(head[0]) + lora(low) * 2.0
    assert isinstance(logits, DeferredLogits)
    leaves = (*head, low, adapter)
    expected = plain(head) + 2.0 * F.linear(low, adapter)
    target = labels().view(-1)
    got = torch.autograd.grad(F.cross_entropy(logits.view(-1, VOCAB), target), leaves)
    for a, b in zip(
        got, torch.autograd.grad(F.cross_entropy(expected.view(-1, VOCAB), target), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)
    assert logits._value is None


def test_copies_and_pickles_are_ordinary_tensors(head):
    logits = deferred([head[0].detach(), *(t.requires_grad_(False) for t in head[1:])])
    for twin in (copy.deepcopy(logits), pickle.loads(pickle.dumps(logits))):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, plain(head))


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ((), (1.0, None)),
        ((("mul", 3.0), ("div", 2.0)), (1.5, None)),
        ((("div", 5.0), ("tanh", None), ("mul", 5.0)), (1.0, 5.0)),
        ((("mul", 0.5), ("tanh", None)), (0.5, 1.0)),
        ((("tanh", None), ("tanh", None)), None),
        ((("tanh", None), ("mul", -2.0)), None),
        ((("mul", 1e30),), None),
        ((("mul", 1e30), ("mul", 1e30), ("div", 1e30), ("div", 1e30)), None),
        ((("mul", 0.0),), (0.0, None)),
    ],
)
def test_summary_of_what_happened_to_logits(ops, expected):
    assert as_scale_and_softcap(ops) == expected


def test_negative_softcap_is_computed_plainly(head):
    """tanh(z) * -2 is no softcap of the kernel: the loss must still be right."""
    got = F.cross_entropy((torch.tanh(deferred(head)) * -2.0).view(-1, VOCAB), labels().view(-1))
    expected = F.cross_entropy((torch.tanh(plain(head)) * -2.0).view(-1, VOCAB), labels().view(-1))
    torch.testing.assert_close(got, expected)


def test_anomaly_detection_sees_gradients_and_changes_none(head):
    def gradients(logits):
        rows = logits.float().view(-1, VOCAB)
        loss = F.cross_entropy(rows, labels().view(-1)) + 0.1 * logits.square().mean()
        return torch.autograd.grad(loss, head)

    with torch.autograd.detect_anomaly(check_nan=True):
        got = gradients(deferred(head))
    for a, b in zip(got, gradients(plain(head)), strict=True):
        torch.testing.assert_close(a, b)
