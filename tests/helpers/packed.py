"""Packed rows."""

import torch


def positions(*rows, device="cpu"):
    """Position ids of rows of documents of these lengths."""
    return torch.tensor([[i for n in row for i in range(n)] for row in rows], device=device)
