"""Sees every tensor that an operation returns."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_trainer.deferred import Deferred


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations return while it is active."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, Deferred) for kind in types):
            return NotImplemented  # theirs to answer; what they compute for it is seen
        result = func(*args, **(kwargs or {}))
        leaves = (t for t in tree_leaves(result) if type(t) is torch.Tensor and not t.is_meta)
        self.seen |= {t.shape for t in leaves}
        return result

    def largest(self, last: int) -> int:
        """Return the rows of the largest tensor whose last dimension is `last`."""
        return max((s.numel() // last for s in self.seen if s and s[-1] == last), default=0)
