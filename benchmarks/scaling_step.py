"""One process of a group that `scaling.py` starts: a model under an engine, and its steps."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

from liger_trainer.runs.shapes import CONFIGS

TINY = CONFIGS["llama-1b"] | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
WARMUP, STEPS = 3, 8


def build(case: tuple, variant: str, device: torch.device):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape, lora, _ = case
    settings = dict(TINY if shape == "tiny" else CONFIGS[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if variant == "liger-kernel":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        import peft

        options = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        model.enable_input_require_grads()
    if variant == "liger-trainer":
        from liger_trainer import inject

        inject(model, strict=True)
    return model.train()


def fsdp2(model):
    """The model, sharded as accelerate does it, and what follows the loss."""
    from torch.distributed.fsdp import fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = head.weight is embedding.weight
    fully_shard([inner.model.norm, *[embedding] * tied, head], reshard_after_forward=False)
    fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=trained[0].is_cuda)

    def finish(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, finish


def zero3(model):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=optimizer, dist_init_required=False
    )

    def finish(loss):
        engine.backward(loss)
        engine.step()

    return engine, finish


def work(case: tuple, engine: str, variant: str) -> dict:
    """What rank 0 reports of its group: milliseconds, GiB, share of communication, loss."""
    cuda = case[0] != "tiny"
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        model = build(case, variant, device)
        vocab = model.config.vocab_size
        model, finish = {"fsdp2": fsdp2, "zero3": zero3}[engine](model)
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(0, vocab, (1, case[2]), generator=generator).to(device)

        def step():
            loss = model(input_ids=ids, labels=ids).loss
            finish(loss)
            return loss.detach()

        for _ in range(WARMUP):
            loss = step().float()
        dist.all_reduce(loss)
        times = [_timed(step, cuda) for _ in range(STEPS)]
        communicating = _communication(step, cuda)
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
        peaks = [torch.zeros((), device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(peaks, peak.to(device))
        return {
            "ms": statistics.median(times),
            "gib": [round(float(p), 2) for p in peaks],
            "communication": communicating / statistics.median(times),
            "loss": float(loss) / dist.get_world_size(),
        }
    finally:
        dist.destroy_process_group()


def _timed(step, cuda: bool) -> float:
    """Milliseconds of a step that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _communication(step, cuda: bool) -> float:
    """Milliseconds of a step in which kernels of NCCL, or operations of gloo, run."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=kinds) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        return sum(e.device_time_total for e in found.key_averages() if "ncclDev" in e.key) / 1000
    return sum(e.cpu_time_total for e in found.key_averages() if e.key.startswith("gloo:")) / 1000


if __name__ == "__main__":
    shape, what, length, engine, variant = sys.argv[1:]
    result = work((shape, what == "LoRA", int(length)), engine, variant)
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)
