"""Logits of one linear layer, deferred and plain."""

import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer.deferred import scope
from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.injection.rules.head import DeferredHead
from liger_trainer.swap import swap

TOKENS, WIDTH, VOCAB = (2, 5), 8, 11


def operands():
    """Return hidden states, weight and bias."""
    torch.manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, requires_grad=True)
    weight = nn.Parameter(torch.randn(VOCAB, WIDTH))
    bias = nn.Parameter(torch.randn(VOCAB))
    return hidden, weight, bias


def deferred(head, fused=True) -> DeferredLogits:
    """Return the deferred logits of such a layer, as in a forward with labels."""
    hidden, weight, bias = head
    layer = linear(weight, bias, fused)
    with scope.deferring(layer):
        return layer(hidden)


def linear(weight, bias, fused=True) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    layer.weight, layer.bias = weight, bias
    swap(layer, DeferredHead, fused)
    return layer


def plain(head):
    return F.linear(*head)


def labels():
    wanted = torch.arange(10).reshape(TOKENS) % VOCAB
    wanted[0, :2] = -100
    return wanted
