"""Configurations of well-known models, for planning without a hub."""

from __future__ import annotations

from typing import Any

_EIGHT_B: dict[str, Any] = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-8b": _EIGHT_B | {
        "model_type": "llama", "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "qwen3-8b": _EIGHT_B | {
        "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36,
        "vocab_size": 151936,
    },
    "mistral-7b": _EIGHT_B | {
        "model_type": "mistral", "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 32768,
    },
    "llama-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
