"""Packed rows."""

import torch


def positions(*rows, device="cpu"):
    """Return position ids of rows of documents with these lengths."""
    return torch.tensor([[i for n in row for i in range(n)] for row in rows], device=device)
