"""LoRA under ZeRO-3, on two processes: python tests/helpers/gathered_lora.py FILE [CASE ...]

Each case trains for three steps, on rows whose lengths differ between processes and steps, with a
prediction after each, and compares with the plain model under the same engine: losses, every
weight, and how many elements of weights are whole between forward and backward, and after the step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from engine_rows import PARTS, zero
from engines import whole_weights
from processes import start
from torch import nn

CASES: dict[str, dict] = {
    "plain": {},
    "trained base, bias": {"bias": True, "trained": ("q_proj.base_layer", "embed_tokens")},
    "dropout": {"dropout": 0.3},
    "two adapters": {"adapters": 2},
    "switched": {  # the engine would fetch the adapters of the step before in advance
        "adapters": 2,
        "switch": True,
        "zero": {"stage3_prefetch_bucket_size": 0},
    },
    "a base of another class": {"other_base": True},
    "checkpointed": {"checkpointed": False},
    "checkpointed, reentrant": {"checkpointed": True},
    "small parameters kept": {"zero": {"stage3_param_persistence_threshold": 1000}},
    "offloaded": {
        "zero": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    },
    "bf16": {"rounds": True, "settings": {"bf16": {"enabled": True}}},
    "autocast": {
        "rounds": True,
        "settings": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    },
}
STEPS = 3


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def model_for(case: dict) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        attention_bias=case.get("bias", False),
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    lora = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules="all-linear",
        lora_dropout=case.get("dropout", 0.0),
    )  # fmt: skip
    model = peft.get_peft_model(model, lora)
    for i in range(1, case.get("adapters", 1)):
        model.add_adapter(f"adapter {i}", lora)
        model.base_model.set_adapter([*model.active_adapters, f"adapter {i}"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or any(t in name for t in case.get("trained", ())))
    for layer in [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]:
        if case.get("other_base"):
            layer.__class__ = OtherLinear
    if "checkpointed" in case:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointed"]})
        model.enable_input_require_grads()
    return model


def wrapped(model, case: dict):
    import deepspeed as ds

    at_once = {"stage3_max_reuse_distance": 0}  # weights are freed though backward needs them again
    settings = zero(3, **PARTS | at_once | case.get("zero", {})) | {
        "gradient_accumulation_steps": 1
    }
    settings |= case.get("settings", {})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = ds.initialize(
        model=model, config=settings, optimizer=optimizer, dist_init_required=False
    )
    return engine


def trained(model: nn.Module, case: dict) -> tuple[list[float], list[int], dict]:
    """Return losses, how many elements of weights were whole, and the final weights."""
    engine = wrapped(model, case)
    losses, whole = [], []
    for step in range(STEPS):
        if case.get("switch"):
            model.base_model.set_adapter([["default"], ["adapter 1"]][step % 2])
            for name, p in model.named_parameters():
                p.requires_grad_("lora_" in name)  # the engine trains all of them
        torch.manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, 64, (2, 5 + 3 * (step % 2) + 4 * dist.get_rank()))
        loss = engine(input_ids=ids, labels=ids).loss
        whole.append(sum(p.numel() for p in model.parameters()))
        engine.backward(loss)
        engine.step()
        whole.append(sum(p.numel() for p in model.parameters()))
        losses.append(loss.item())
        engine.eval()
        with torch.no_grad():
            losses.append(engine(input_ids=ids, labels=ids).loss.item())
        engine.train()
    return losses, whole, whole_weights(engine, model)


def compare(name: str) -> dict[str, float]:
    """Return the distance between the injected and the plain model, and which operations ran."""
    from liger_trainer import inject
    from liger_trainer.injection.rules import lora

    case = CASES[name]
    plain = trained(model_for(case), case)
    model = model_for(case)
    report = inject(model, {"fused_linear_cross_entropy": False})
    calls, fused = [], {n: getattr(lora, n) for n in ("lora_linear", "add_adapters")}
    for n, function in fused.items():
        setattr(lora, n, lambda *args, function=function: calls.append(1) or function(*args))
    ours = trained(model, case)
    for n, function in fused.items():
        setattr(lora, n, function)
    truth, allowed = plain, 1e-4
    if case.get("rounds"):
        truth = trained(model_for(case), {**case, "settings": {}})
        allowed = 1.5 * distance(plain, truth, case)
    return {
        "error": distance(ours, truth, case) / allowed,
        "whole": max(a - b for a, b in zip(ours[1], plain[1], strict=True)),
        "fused": len(calls),
        "sites": sum(row.swapped for row in report.rows if row.rule == "lora"),
    }


def distance(run, truth, case: dict) -> float:
    """Return the largest error of a loss, or of a weight's change relative to that change."""
    initial = dict(model_for(case).named_parameters())
    errors = [abs(a - b) for a, b in zip(run[0], truth[0], strict=True)]
    for name, weight in truth[2].items():
        way = (weight - initial[name]).norm()
        errors.append(((run[2][name] - weight).norm() / (way + 1e-3)).item())
    return max(errors)


def same_mask(x: torch.Tensor, seed: object, probability: float) -> torch.Tensor:
    """Return a dropout mask that depends only on the shape: PEFT uses another generator."""
    generator = torch.Generator().manual_seed(x.numel())
    return (torch.rand(x.numel(), generator=generator) >= probability).view(x.shape)


def dropped(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return x * same_mask(x, None, self.p) / (1 - self.p) if self.training else x


def worker(names: list[str], out: str) -> None:
    from liger_trainer.kernels.layers import lora_linear

    dist.init_process_group("gloo")
    lora_linear.dropout_mask, nn.Dropout.forward = same_mask, dropped
    results = {}
    for name in names:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, compare(name))
        results[name] = everyone
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    start(2, worker, sys.argv[2:] or list(CASES), sys.argv[1])
