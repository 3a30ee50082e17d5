"""Logits that are written to: what was derived before keeps its value, what is a view sees it."""

import pytest
import torch
import torch.nn.functional as F
from deferred_head import VOCAB, deferred, labels, operands, plain

# What is derived from the logits z, before one of both is written to.
DERIVED = {
    "scaled": lambda z: z * 2,
    "tanh": lambda z: torch.tanh(z / 3) * 3,
    "log_softmax": lambda z: z.log_softmax(-1),
    "clone": lambda z: z.clone(),
    "copied tokens": lambda z: z[torch.tensor([1, 0])],
    "contiguous copy": lambda z: z[:, :-1].contiguous(),
    "copy by reshape": lambda z: z[:, :-1].reshape(-1, VOCAB),
    "scaled view": lambda z: z[:, :-1] * 2,
    "view of scaled": lambda z: (z * 2)[:, 1:],
    "view": lambda z: z[:, :-1],
    "reshaped": lambda z: z.reshape(-1, VOCAB),
    "detached": lambda z: z.detach(),
}


def without_gradient(write):
    @torch.no_grad()
    def written(z):
        write(z)

    return written


WRITES = {
    "mul_": lambda z: z.mul_(3),
    "tanh_": lambda z: z.tanh_(),
    "twice": lambda z: z.div_(2).mul_(6),
    "two statements": lambda z: (z.div_(2), z.mul_(6)),
    "masked": lambda z: z.masked_fill_(torch.arange(VOCAB) % 3 == 0, -5.0),
    "mul_ without gradient": without_gradient(lambda z: z.mul_(3)),
    "fill_ without gradient": without_gradient(lambda z: z[..., :4].fill_(0)),
    "through data": lambda z: z.data.mul_(3),
    "through numpy": lambda z: z.detach().numpy().fill(0.5),
}


def cross_entropy(z):
    z = z.flatten(0, -2)
    return F.cross_entropy(z, labels().flatten()[-len(z) :])


USES = {
    "loss of the derived": lambda z, y: cross_entropy(y),
    "loss of the logits": lambda z, y: cross_entropy(z),
    "both": lambda z, y: cross_entropy(z) + cross_entropy(y) + y.square().mean(),
    "values": lambda z, y: (y.square() * y.argmax(-1, keepdim=True)).mean() + z.logsumexp(-1).sum(),
}


def results(logits, head, derive, write, writes_derived, use):
    z = logits(head)
    y = derive(z)
    write(y if writes_derived else z)
    loss = use(z, y)
    grads = torch.autograd.grad(loss, head, allow_unused=True) if loss.requires_grad else ()
    return [loss.detach(), *grads]


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED.keys())
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("writes_derived", [False, True], ids=["logits", "derived"])
def test_writes_reach_views_and_nothing_else(derive, write, writes_derived):
    for name, use in USES.items():
        arguments = derive, write, writes_derived, use
        try:
            expected = results(plain, operands(), *arguments)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:40].replace("(", ".")):
                results(deferred, operands(), *arguments)
            continue
        got = results(deferred, operands(), *arguments)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
