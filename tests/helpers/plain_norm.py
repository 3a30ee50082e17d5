"""A norm of which a subclass can get the arithmetic slightly wrong."""

import torch
from torch import nn


class Norm(nn.Module):
    """A Llama norm whose arithmetic a subclass can get slightly wrong."""

    def __init__(self, width=64, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        return self.weight * self.scale(
            h, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)

    def scale(self, x, normed):
        return normed
