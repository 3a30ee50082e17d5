"""Configurations of well-known models, for planning without a hub."""

from __future__ import annotations

from typing import Any

_EIGHT_B: dict[str, Any] = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _EIGHT_B | {
        "model_type": "llama", "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "qwen3-8b": _EIGHT_B | {
        "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36,
        "vocab_size": 151936,
    },
    "mistral-7b-v0.3": _EIGHT_B | {
        "model_type": "mistral", "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 32768,
    },
    "llama-3.1-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """Return the configuration of a model by its name, that of a recipe, or part of one.

    Words before or after it do not count ("meta-llama/Llama-3.1-8B-Instruct"), nor does what tells
    it from none of the others ("llama-8b"). Raises ValueError for other names.
    """
    words = set(name.rpartition("/")[2].lower().split("-"))
    found = [each for each in CONFIGS if words <= _words(each) or words >= _words(each)]
    if len(found) != 1:
        raise ValueError(f"--shape {name!r} is none of {', '.join(CONFIGS)}")
    return dict(CONFIGS[found[0]])


def _words(name: str) -> set[str]:
    return set(name.split("-"))
