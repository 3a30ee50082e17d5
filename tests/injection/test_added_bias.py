"""A bias over the vocabulary that a model adds to the logits beside its head, as BART does."""

import pytest
import torch
import torch.nn.functional as F
from deferred_head import VOCAB, deferred, labels, operands, plain
from transformers import BartConfig, BartForConditionalGeneration

from liger_trainer import inject
from liger_trainer.deferred import scope
from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.deferred.token_scores import divergence, token_scores

BIAS = torch.linspace(-2.0, 2.0, VOCAB)
MASK = labels() >= 0
CONSUMERS = {
    "token scores": lambda z: token_scores(z, labels(), outputs=["entropy"])[:2],
    "gather": lambda z: z.log_softmax(-1).gather(-1, labels().clamp_min(0).unsqueeze(-1)),
    "student": lambda z: divergence(z, deferred(operands()), MASK, beta=0.5),
    "teacher": lambda z: divergence(deferred(operands()), z.detach(), MASK, beta=0.5),
    "arg max": lambda z: z.argmax(-1),
    "mean": lambda z: z.detach().mean(-1),
}


@pytest.fixture
def plain_calls():
    """Counts the calls of a head for its plain logits."""
    before = scope.plain_calls()
    return lambda: scope.plain_calls() - before


@pytest.mark.parametrize("consume", CONSUMERS.values(), ids=CONSUMERS.keys())
@pytest.mark.parametrize("shape", [(VOCAB,), (1, VOCAB), (1, 1, VOCAB)])
def test_every_consumer_reads_it(consume, shape, plain_calls):
    bias = BIAS.view(shape)
    got = consume(deferred(operands()) + bias)
    assert not plain_calls()
    torch.testing.assert_close(got, consume(plain(operands()) + bias))


def test_what_is_added_is_the_bias_of_that_moment():
    bias = BIAS.clone()
    logits = deferred(operands()) + bias
    bias.zero_()
    torch.testing.assert_close(logits.argmax(-1), (plain(operands()) + BIAS).argmax(-1))
    torch.testing.assert_close(logits + 0.0, plain(operands()) + BIAS)


@pytest.mark.parametrize(
    "add",
    [
        lambda z: z * 0.5 + BIAS,  # after a scale
        lambda z: z + BIAS + BIAS,
        lambda z: z + BIAS.double(),
        lambda z: z + BIAS[:1],  # one number
        lambda z: z + torch.ones(2, 1, 1),  # of each row
        lambda z: z + torch.eye(5, VOCAB),  # of each token
        lambda z: z + BIAS.clone().requires_grad_(),
        lambda z: z + 1,
        lambda z: torch.add(z, BIAS, alpha=2),
    ],
)
def test_other_sums_are_computed(add):
    got, expected = add(deferred(operands())), add(plain(operands()))
    assert not isinstance(got, DeferredLogits)
    torch.testing.assert_close(got, expected)


def test_under_autocast_it_widens_the_logits(plain_calls):
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = deferred(operands()) + BIAS, plain(operands()) + BIAS
        assert got.dtype == expected.dtype == torch.float32
        rows = got.view(-1, VOCAB), expected.view(-1, VOCAB)
        losses = [F.cross_entropy(z, labels().view(-1)) for z in rows]
    assert not plain_calls()
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


def test_bart_trains_without_whole_logits(plain_calls):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    model = BartForConditionalGeneration(BartConfig(**sizes)).eval()
    model.final_logits_bias.normal_()
    targets = torch.randint(4, 100, (2, 9))
    targets[0, 5:] = -100
    batch = {"input_ids": torch.randint(4, 100, (2, 7)), "labels": targets}

    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step()
    inject(model)
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-6)
    assert not plain_calls()
