"""A small linear head, the paths on which it is tested, and what its matrix products cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_trainer.kernels.linear import head as linear_head

TOKENS, WIDTH, VOCAB, FIRST = 12, 5, 33, 3

every_rows = pytest.mark.parametrize("rows", [16, 5], ids=["one workspace", "several workspaces"])


@pytest.fixture(autouse=True)
def small_first_part(monkeypatch):
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


def leaves_of(tensors):
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def assert_all_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


_FACTORS = {  # where the two factors stand among the arguments
    torch.ops.aten.mm: slice(0, 2),
    torch.ops.aten.addmm: slice(1, 3),
    torch.ops.aten.addmm_: slice(1, 3),
}


class Products(TorchDispatchMode):
    """Counts the multiplications of GEMMs in which the vocabulary is a dimension."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.multiplications = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FACTORS:
            left, right = args[_FACTORS[func.overloadpacket]]
            if self.vocab in (*left.shape, *right.shape):
                self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return result

    def of(self, tokens: int, width: int) -> float:
        """Return the count in units of the GEMM that computes the logits of `tokens` tokens."""
        return self.multiplications / (tokens * width * self.vocab)
