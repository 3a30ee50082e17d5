"""The tiny model of the engine matrix, and the ways in which its loss is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MICRO, LENGTH, VOCAB, LR = 2, 12, 128, 0.05


def tiny(tied: bool, kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return with_adapters(LlamaForCausalLM(config).train(), kind, tied)


def with_adapters(model: nn.Module, kind: str, tied: bool) -> nn.Module:
    """Return `model`; for "LoRA", with an adapter on every linear layer."""
    if kind == "LoRA":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    base_of(model).lm_head_weight_is_tied = tied
    return model


def base_of(model: nn.Module) -> nn.Module:
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def in_the_forward(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


def outside(model, ids, labels):
    from liger_trainer import loss_scope

    with loss_scope():
        logits = model(input_ids=ids).logits
        rows = logits[:, :-1].reshape(-1, VOCAB).float()
        return F.cross_entropy(rows, labels[:, 1:].flatten(), label_smoothing=0.1)


def from_log_probs(model, ids, labels):
    """Return the loss of preference pairs, from token log-probabilities."""
    from liger_trainer import loss_scope
    from liger_trainer.deferred.token_scores import token_scores

    with loss_scope():
        logits = model(input_ids=ids).logits[:, :-1]
        log_probs = token_scores(logits, labels[:, 1:]).log_probs.sum(-1)
    chosen, rejected = log_probs.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def with_own_term(model, ids, labels):
    outputs = model(input_ids=ids, labels=labels)
    return outputs.loss + 0.01 * outputs.logits.float().pow(2).mean()


LOSSES = {
    "labels": in_the_forward,
    "own loss": outside,
    "log-probabilities": from_log_probs,
    "own term": with_own_term,
}
