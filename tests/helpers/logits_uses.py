"""Odd uses of logits, and how a use of deferred logits is compared with that of plain ones."""

import copy
import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model

from liger_trainer import inject
from liger_trainer.deferred import Deferred

V = 128
USES = {}
NAMES_A_WAY_OUT = r"restore\(model\)|liger_kernel_config|without labels"


def use(function):
    """Register a case: `function(model, outputs)` returns what it saw, tensors or numbers.

    It may add to `outputs.loss`; what does not need a gradient is compared as it is.
    """
    USES[function.__name__] = function
    return function


@functools.cache
def models():
    plain = tiny_model("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=48)
    plain.set_attn_implementation("eager")  # which has second and forward derivatives
    injected = copy.deepcopy(plain)
    assert not inject(injected).refused
    return injected, plain


def inputs():
    ids = torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(6) < 2, -100)


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def forward(model, with_labels, ids=None, labels=None, **more):
    """Return loss and logits; without labels, the loss is computed from the logits."""
    made_ids, made_labels = inputs()
    more = more or {"input_ids": made_ids if ids is None else ids}
    labels = made_labels if labels is None else labels
    out = model(labels=labels if with_labels else None, **more)
    assert with_labels or not isinstance(out.logits, Deferred)
    loss = out.loss if with_labels else loss_of(out.logits, labels)
    return SimpleNamespace(loss=loss, logits=out.logits, with_labels=with_labels)


def run(model, function, with_labels):
    """Return what the use saw, and the gradients of the loss (with what the use added to it)."""
    torch.manual_seed(0)
    out = forward(model, with_labels)
    seen = function(model, out)
    seen = list(seen) if isinstance(seen, (tuple, list)) else [seen]
    seen = [value.detach() + 0 if torch.is_tensor(value) else value for value in seen]
    if out.loss.requires_grad:
        out.loss.backward()
    grads = [None if p.grad is None else p.grad.detach() for p in model.parameters()]
    return [*seen, out.loss.detach(), *grads]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if torch.is_tensor(b):
            assert torch.is_tensor(a), f"{a} for a tensor"
            scale = b.double().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0
            tolerance = {"rtol": 2e-4, "atol": max(2e-6, 2e-5 * scale)}
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
        else:
            assert a == b


def compare(function, with_labels, pair=None):
    injected, plain = (copy.deepcopy(m) for m in pair or models())
    try:
        expected = run(plain, function, with_labels)
    except Exception as error:
        with pytest.raises(type(error)):
            run(injected, function, with_labels)
        return
    got, error = attempt(injected, function, with_labels)
    if error is None:
        assert_same(got, expected)
        return
    assert with_labels, f"only the plain logits do not raise: {error}"
    assert re.search(NAMES_A_WAY_OUT, str(error)), f"no way out: {error}"
    RAISED.add(function.__name__)


def attempt(model, function, with_labels):
    try:
        return run(model, function, with_labels), None
    except (RuntimeError, ValueError) as error:
        return None, error


RAISED = set()
