"""Further families, whose heads are unusual."""

import pytest
import torch
import trl_parity
from families import SMALL, tiny_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

_DECODER = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MORE = {
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": {
        "dim_model_base": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    # TRL's own head is wrong for those below. A scale that the config has and the model ignores:
    "mpt": {"logit_scale": 0.5},
    # A softcap or scale under a name of its own:
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 64,
        "attention_window_size": 8,
        "logits_soft_cap": 5.0,
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "output_logit_soft_cap": 5.0},
    "inkling_text": {
        "logits_mup_width_multiplier": 4.0,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "sliding_window_size": 8,
    },
    # A backbone under a name of its own:
    "llama4_text": {"num_local_experts": 4},
    # A dense layer before the last one:
    "modernbert-decoder": {},
    "bert": _DECODER,
    "roberta": _DECODER,
    "rembert": _DECODER,
}


def chameleon():
    """Masks the tokens of images after the head, which TRL's own head does not."""
    quantizer = {"embed_dim": 16, "num_embeddings": 8, "base_channels": 32, "resolution": 16}
    quantizer |= {"channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 16}
    images = {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGH")}
    sizes = SMALL | {"vq_config": quantizer, "vocabulary_map": {"<image>": 5, **images}}
    return AutoConfig.for_model("chameleon", **sizes)


def gemma3():
    """Has a softcap in its config which it does not apply, but TRL's own head does."""
    text = SMALL | {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    sizes = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    return AutoConfig.for_model("gemma3", **sizes)


IMAGE_TEXT = {"chameleon": chameleon, "gemma3": gemma3}


def model(family):
    torch.manual_seed(0)
    if family in IMAGE_TEXT:
        made = AutoModelForImageTextToText.from_config(IMAGE_TEXT[family]())
    elif family in MORE:
        if family not in CONFIG_MAPPING:
            pytest.skip("this release of transformers does not have it")
        config = AutoConfig.for_model(family, **SMALL | MORE[family])
        made = AutoModelForCausalLM.from_config(config)
    else:
        made = tiny_model(family)
    return trl_parity.sharpen(made.train(), scale=0.5)
