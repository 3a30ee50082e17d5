"""Norms, rotary embedding, gated units, LoRA and packed attention: the layers of a model."""
