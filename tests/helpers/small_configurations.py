"""Configurations so small that any architecture of transformers trains in a blink on a CPU.

Sizes are set by the names that configurations give them; what a configuration does not have is left
out. The few whose sizes must fit each other in their own way are listed.
"""

from __future__ import annotations

from transformers import PretrainedConfig

VOCAB = 128
_SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size "
    "codebook_size num_embeddings ngram_vocab_size_base",
    64: "hidden_size d_model n_embd dim embed_dim embed_dims emb_dim word_embed_proj_dim "
    "out_hidden_size text_hidden_size vision_hidden_size encoder_hidden_size projection_dim "
    "max_position_embeddings n_positions max_seq_len position_embedding_size lru_width n_ctx "
    "hidden_size_global embedding_size attention_hidden_size max_sequence_length "
    "projector_hidden_size projection_hidden_size adapter_in_dim adapter_out_dim "
    "adapter_input_size num_position_embeddings dim_model_base vision_output_dim "
    "projector_input_dim projector_output_dim decoder_hidden_size post_conv_in_channels "
    "post_conv_out_channels post_conv_mid_channels output_channels embedding_dim model_dim "
    "image_token_embed_dim output_dim downsample_hidden_size context_length",
    192: "patch_embed_hidden_size",  # of three channels and patches of eight by eight
    96: "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff "
    "ffn_hidden_size mlp_dim intermediate_size_mlp feed_forward_size dense_intermediate_size "
    "prefix_dense_intermediate_size shared_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size image_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size kv_lora_rank "
    "q_lora_rank chunk_size mamba_chunk_size hidden_size_per_layer_input",
    16: "head_dim kv_channels qk_nope_head_dim v_head_dim global_head_dim d_kv swa_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim indexer_head_dim index_head_dim "
    "mamba_head_dim mamba_d_head mamba_d_state ssm_state_size state_size d_head "
    "query_pre_attn_scalar attention_head_size resampler_head_dim",
    8: "qk_rope_head_dim sliding_window sliding_window_size patch_size hc_lowrank laurel_rank "
    "attention_chunk_size attention_window_size index_topk indexer_budget rotary_dim "
    "mamba_dt_rank time_step_rank gated_norm_rank adapter_rank o_lora_rank mamba_n_heads",
    4: "num_attention_heads n_head num_heads n_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "linear_num_value_heads num_encoder_attention_heads num_decoder_attention_heads "
    "swa_num_attention_heads resampler_n_heads linear_num_heads n_mamba_heads zero_expert_num "
    "mm_tokens_per_image",
    2: "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers layers "
    "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k "
    "linear_num_key_heads swa_num_key_value_heads num_decoder_layers num_encoder_layers "
    "indexer_n_heads index_n_heads indexer_compress_ratio num_kv_heads num_mem_blocks "
    "mamba_n_groups n_groups num_query_groups mamba_ngroups num_blocks num_global_layers "
    "pooling_kernel_size",
    1: "first_k_dense_replace num_nextn_predict_layers indexer_kv_heads n_group topk_group "
    "kv_n_heads num_dense_layers num_expert_group",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
_WANTED = ("head_dim", "num_experts_per_tok", "n_routed_experts")  # also where the default is None
_TOKENS = {
    "image_token_id": 64,
    "image_token_index": 64,
    "video_token_id": 65,
    "video_token_index": 65,
}
_OF_TEXT = ("pad", "bos", "eos")
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_START_TOKENS = {"vision_start_token_id": 70, "audio_start_token_id": 71}
_CHANGES = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 64, "IMGIMGBCHZ": 65}},  # of code 127
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: _ROPE | {"mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "emu3": {
        "vocabulary_map": {"<image>": 64, "<|visual token 000127|>": 65, "<|extra_200|>": 66},
    },
    "emu3_vqgan": {"base_channels": 32, "hidden_size": 128},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"vision_soft_tokens_per_image": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "inkling_vision": {"n_layers": 6},  # with fewer layers than scales, it needs scipy
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR_AND_FULL,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "perception_lm": {"vision_use_cls_token": False},
    "qwen2_5_omni_thinker": _START_TOKENS,
    "qwen3_omni_moe_thinker": _START_TOKENS,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "step3p5": {"sliding_window": 8},
    "udop": {"decoder_start_token_id": 0},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64]},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 128},
}

_VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# In place of vision towers that need timm.
TOWERS = {
    "fast_vlm": {
        "model_type": "convnext",
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "hidden_size": 64,
        "image_size": 64,
        "patch_size": 4,
    },
    "gemma3n": _VIT | {"vocab_size": 8, "vocab_offset": 64, "rms_norm_eps": 1e-6},
    "perception_lm": _VIT | {"model_args": {"embed_dim": 64}},
}

# Where the defaults are no valid configuration: all layers of such a model read another's keys.
_DRAFTS = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
DEFAULTS = {
    name: {"text_config": _DRAFTS} for name in ("gemma4_assistant", "gemma4_unified_assistant")
}


def small_values(config: PretrainedConfig, defaults: dict | None = None) -> dict:
    """Return what to build `config`'s kind with so that it is small and has no dropout.

    What is not small by itself stays where it differs from the `defaults` of that kind.
    """
    values = {}
    for name, value in vars(config).items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, PretrainedConfig):
            values[name] = small_values(value, vars(type(value)()))
            values[name]["model_type"] = value.model_type
        elif name == "vision_config" and value is None:
            values[name] = small_values(config.sub_configs[name]())
        elif name in _SIZE and (number or name in _WANTED):
            values[name] = _SIZE[name] if value is None else min(_SIZE[name], value)
        elif name in _SIZE and isinstance(value, (list, tuple)) and len(value) == 2:
            values[name] = [_SIZE[name]] * 2  # height and width
        elif name == "global_attn_indexes":
            values[name] = [1]
        elif name == "image_grid_pinpoints":
            values[name] = [[_SIZE["image_size"]] * 2]
        elif name in _TOKENS and value is None:
            values[name] = _TOKENS[name]
        elif number and name.endswith(("token_id", "token_index")):
            other = value >= VOCAB or not name.startswith(_OF_TEXT)
            values[name] = value % 64 + 64 if other else value
        elif isinstance(value, float) and "drop" in name:
            values[name] = 0.0
        elif (
            defaults and isinstance(value, (bool, int, float, str)) and defaults.get(name) != value
        ):
            values[name] = value
    if "use_cache" in vars(config):
        values["use_cache"] = False
    if "qk_rope_head_dim" in values:  # all heads of such attention have keys of their own
        values["num_key_value_heads"] = values["num_attention_heads"]
        if "head_dim" in values:  # that of the rotated part, or of both
            both = config.head_dim > config.qk_rope_head_dim
            values["head_dim"] = values["qk_rope_head_dim"] + both * values.get(
                "qk_nope_head_dim", 0
            )
    rope = vars(config).get("rope_parameters")
    if rope and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        values["rope_parameters"] = _sectioned(rope, values)
    return _merged(values, _CHANGES.get(config.model_type, {}))


def _sectioned(rope: dict, values: dict) -> dict:
    """Return `rope` with sections for three axes that make up half of a small head."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    axis = half * 3 // 8
    return rope | {"mrope_section": [axis, axis, half - 2 * axis]}


def _merged(values: dict, changes: dict) -> dict:
    nested = {
        name: _merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(values.get(name), dict)
    }
    return values | changes | nested
