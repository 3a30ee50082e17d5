"""Losses and token statistics of materialized logits."""
