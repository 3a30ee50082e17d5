"""Rewards for GRPO, and the sandbox in which untrusted programs are judged."""
