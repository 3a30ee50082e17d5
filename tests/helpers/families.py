"""Tiny random instances of real architectures, built from their own configuration classes."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}

# Multipliers whose default is 1 are set, so that a rule that ignores them shows.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi3": {"partial_rotary_factor": 0.5},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "smollm3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, **_MOE},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, **_MOE},
}


def tiny_model(family: str, device: str = "cpu", **changes) -> torch.nn.Module:
    """Return a model in training mode, without dropout; all parameters are random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(device).train()


def batch(device: str = "cpu", vocab: int = 128, length: int = 17) -> dict[str, torch.Tensor]:
    """Return two sequences, one of them padded, with ignored prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in inputs.items()}
