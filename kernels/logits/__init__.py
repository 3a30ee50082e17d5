"""Losses and token statistics of logits that exist."""
