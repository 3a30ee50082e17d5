"""A tiny random model of every architecture of the installed transformers, plain and injected.

    python tests/helpers/architectures.py > docs/coverage.md          # all of them, some minutes
    python tests/helpers/architectures.py llama qwen3_next            # a few

Sizes are set by the names that configurations give them; what a configuration does not have is left
out. The few models whose sizes must fit each other in their own way are listed.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from liger_trainer import inject
from liger_trainer.kernels import runtime
from liger_trainer.report import InjectionReport

TASKS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (
        AutoModelForImageTextToText,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}
VOCAB = 128
_SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size "
    "codebook_size num_embeddings ngram_vocab_size_base",
    64: "hidden_size d_model n_embd dim embed_dim embed_dims emb_dim word_embed_proj_dim "
    "out_hidden_size text_hidden_size vision_hidden_size encoder_hidden_size projection_dim "
    "max_position_embeddings n_positions max_seq_len position_embedding_size lru_width n_ctx "
    "hidden_size_global embedding_size attention_hidden_size max_sequence_length "
    "projector_hidden_size num_position_embeddings dim_model_base embedding_dim model_dim "
    "image_token_embed_dim output_dim downsample_hidden_size context_length",
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
    "swa_num_attention_heads resampler_n_heads linear_num_heads n_mamba_heads zero_expert_num",
    2: "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers layers "
    "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k "
    "linear_num_key_heads swa_num_key_value_heads num_decoder_layers num_encoder_layers "
    "indexer_n_heads index_n_heads indexer_compress_ratio num_kv_heads num_mem_blocks "
    "mamba_n_groups n_groups num_query_groups mamba_ngroups num_blocks num_global_layers",
    1: "first_k_dense_replace num_nextn_predict_layers indexer_kv_heads n_group topk_group "
    "kv_n_heads num_dense_layers num_expert_group",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
_WANTED = ("head_dim",)  # also where the default is None
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_CHANGES = {
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR_AND_FULL,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 128},
}


def names(task: str) -> list[str]:
    return sorted(TASKS[task][1])


def small_values(config: PretrainedConfig) -> dict:
    """Return values that make a configuration of `config`'s class small and free of dropout."""
    values = {}
    for name, value in vars(config).items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, PretrainedConfig):
            values[name] = small_values(value)
        elif name in _SIZE and (number or name in _WANTED):
            values[name] = _SIZE[name] if value is None else min(_SIZE[name], value)
        elif number and name.endswith(("token_id", "token_index")) and value >= VOCAB:
            values[name] = value % 64 + 64
        elif isinstance(value, float) and "drop" in name:
            values[name] = 0.0
    if "use_cache" in vars(config):
        values["use_cache"] = False
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | _CHANGES.get(config.model_type, {})


def tiny(task: str, model_type: str) -> torch.nn.Module:
    """Return the model in training mode, with every parameter random."""
    torch.manual_seed(0)
    values = small_values(AutoConfig.for_model(model_type))
    if text := _CHANGES.get(model_type, {}).get("text_config"):
        own = small_values(AutoConfig.for_model(model_type).text_config)
        values["text_config"] = own | text
    model = TASKS[task][0].from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def text() -> dict[str, torch.Tensor]:
    """Return two sequences of ordinary tokens, the first five positions without a label."""
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of a model with kernels and the plain model."""

    loss: float  # difference, relative
    gradient: float  # the largest difference of a parameter's gradient, relative to its norm
    report: InjectionReport

    @property
    def equal(self) -> bool:
        return self.loss < 1e-5 and self.gradient < 1e-4


class NotTrainedError(Exception):
    """The plain model cannot be built or trained on text alone."""


def compare(task: str, model_type: str) -> Comparison:
    try:
        plain = tiny(task, model_type)
        model = copy.deepcopy(plain)
        expected = plain(**text()).loss
        expected.backward()
    except Exception as error:  # a stranger's model may raise anything
        raise NotTrainedError(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error
    report = inject(model)
    with runtime.every_size():
        loss = model(**text()).loss
        loss.backward()
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    ]
    largest = max(q.norm().item() for _, q in pairs)
    # The floor makes 1e-7 of the largest gradient, fp32 rounding, count as nothing.
    errors = [(p - q).norm().item() / (q.norm().item() + 1e-3 * largest) for p, q in pairs]
    difference = abs(loss.item() - expected.item()) / max(1.0, abs(expected.item()))
    return Comparison(difference, max(errors), report)


_RULES = ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "fused_linear_cross_entropy")


def row(task: str, model_type: str) -> str:
    """Return the line of a table for one architecture."""
    try:
        found = compare(task, model_type)
    except NotTrainedError as reason:
        return _failed(model_type, f"plain model not trained: {reason}")
    except Exception as error:  # a fault: the plain model trains
        return _failed(model_type, f"raises {type(error).__name__}: {error}")
    coverage = [found.report.coverage.get(rule) for rule in _RULES]
    cells = [f"{c.swapped}/{c.eligible}" if c and c.eligible else "" for c in coverage]
    reasons = dict.fromkeys(f"{r.rule}: {r.reason}" for r in found.report.refused)
    state = "equal" if found.equal else f"differs ({found.loss:.0e}, {found.gradient:.0e})"
    return f"| {' | '.join([model_type, state, *cells, '; '.join(reasons)])} |".replace("  ", " ")


def _failed(model_type: str, why: str) -> str:
    why = " ".join(why.split())[:120].replace("|", "/")
    return f"| {model_type} | {why} |" + " |" * (len(_RULES) + 1)


def page(chosen: list[str]) -> None:
    """Print the page, of the chosen model types or of all."""
    transformers.logging.set_verbosity_error()
    print(f"""# Coverage

Every architecture of transformers {transformers.__version__}, as a tiny random model in fp32 on a
CPU, trained on text: loss and every gradient with kernels against the plain model. Cells are
swapped / eligible places. Written by `python tests/helpers/architectures.py > docs/coverage.md`.
""")
    for task in TASKS:
        print(f"## {task}\n")
        print(f"| model | result | {' | '.join(_RULES)} | not swapped |")
        print("|---" * (len(_RULES) + 3) + "|")
        for model_type in names(task):
            if not chosen or model_type in chosen:
                print(row(task, model_type), flush=True)
                gc.collect()
        print()


if __name__ == "__main__":
    page(sys.argv[1:])
