"""Logits of a part of the vocabulary stay deferred, as where a model leaves out its padding."""

import pytest
import torch
import torch.nn.functional as F
from deferred_head import VOCAB, deferred, labels, operands, plain
from torch import nn

from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.deferred.token_scores import divergence, token_scores

BIAS = torch.linspace(-2.0, 2.0, VOCAB)[None]
COLUMNS = {
    "first": lambda z: z[..., : VOCAB - 2],
    "without the last": lambda z: z[..., :-2],
    "from the middle": lambda z: z[..., 1:-1],
    "twice": lambda z: z[..., 1:][..., :-1],
    "of biased logits": lambda z: (z + BIAS)[..., 1:-1],
    "then biased": lambda z: z[..., 1:-1] + BIAS[..., 1:-1],
    "after a softcap": lambda z: (torch.tanh(z.float() / 3.0) * 3.0)[..., :-2],
    "before a softcap": lambda z: torch.tanh(z[..., :-2] / 3.0) * 3.0,
    "of shifted tokens": lambda z: z[:, 1:][..., :-2],
}
LEFT = VOCAB - 2
cut = pytest.mark.parametrize("cut", COLUMNS.values(), ids=COLUMNS.keys())


@pytest.fixture
def head():
    return operands()


def targets(logits):
    return labels().clamp_max(LEFT - 1)[:, -logits.shape[1] :]


USES = {
    "cross entropy": lambda z: F.cross_entropy(z.reshape(-1, LEFT), targets(z).reshape(-1)),
    "log-probabilities": lambda z: (
        z.log_softmax(-1).gather(-1, targets(z).clamp_min(0)[..., None]).sum()
    ),
    "scores": lambda z: token_scores(z, targets(z)).log_probs.sum(),
    "divergence": lambda z: divergence(
        z, torch.linspace(-1, 1, z.numel()).view(z.shape), targets(z) >= 0, beta=0.5
    )[0],
}


@cut
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_loss_and_gradients_as_from_plain_logits(head, cut, fused, use):
    loss, expected = use(cut(deferred(head, fused=fused))), use(cut(plain(head)))
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, head)
    for a, b in zip(got, torch.autograd.grad(expected, head), strict=True):
        torch.testing.assert_close(a, b)


@cut
@pytest.mark.parametrize("use", [name for name in USES if name != "divergence"])
def test_they_are_not_computed(head, cut, use):
    whole = deferred(head)
    logits = cut(whole)
    assert isinstance(logits, DeferredLogits)
    USES[use](logits).backward()
    assert logits._value is None
    assert whole._value is None


@cut
def test_a_divergence_takes_columns_of_both(head, cut):
    other = [nn.Parameter(0.9 * t.detach()) for t in head]
    student, teacher = cut(deferred(head)), cut(deferred(other))
    mask = targets(student) >= 0
    got = divergence(student, teacher, mask, beta=0.5)
    expected = divergence(cut(plain(head)), cut(plain(other)), mask, beta=0.5)
    torch.testing.assert_close(got, expected)
    assert student._value is None
    assert teacher._value is None


@cut
def test_metrics(head, cut):
    with torch.no_grad():
        logits, expected = cut(deferred(head)), cut(plain(head))
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(logits.mean(-1), expected.mean(-1))
        assert logits._value is None
        assert torch.equal(logits + 0, expected)


@pytest.mark.parametrize(
    "index",
    [(..., slice(None, None, 2)), (..., slice(3, 3)), (..., 0), (slice(None), slice(None), [0, 1])],
    ids=str,
)
def test_any_other_part_of_the_vocabulary_is_computed(head, index):
    assert torch.equal(deferred(head)[index], plain(head)[index])


def test_columns_share_memory_with_the_logits(head):
    with torch.no_grad():
        whole = deferred(head)
        columns = whole[..., :LEFT]
        whole += 1.0
        assert torch.equal(columns + 0, plain(head)[..., :LEFT] + 1.0)
