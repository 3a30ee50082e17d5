"""One process of a group that `scaling.py` starts: a model under an engine, and its steps."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

from liger_trainer.runs.engine import leave_group
from liger_trainer.runs.planning.shapes import config_of

TINY = config_of("llama-1b") | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
WARMUP, STEPS = 3, 8


def build(case: tuple, variant: str, device: torch.device):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape, lora, _ = case
    settings = dict(TINY) if shape == "tiny" else config_of(shape)
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
    """Return the model, sharded as accelerate does it, and the function to call after the loss."""
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


class WholeBatch:
    """Every rank trains on its own, whole sequences."""

    def __init__(self, vocab: int, length: int, device: torch.device):
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.ids = torch.randint(0, vocab, (1, length), generator=generator).to(device)

    def __call__(self, model, finish):
        loss = model(input_ids=self.ids, labels=self.ids).loss
        finish(loss)
        return loss.detach()


class SharedSequence:
    """All ranks train on one sequence, each on a part of its tokens; attention goes round.

    torch's context parallel for sdpa, with the labels shifted before the sequence is cut. As
    accelerate does it, attention layers get no mask and are told that they are causal.
    """

    def __init__(self, model, vocab: int, length: int, device: torch.device):
        self.mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (1, length), generator=generator).to(device)
        positions = torch.arange(length, device=device)[None]
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        self.whole = ids, positions, labels
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_pre_hook(_causal, with_kwargs=True)

    def __call__(self, model, finish):
        from torch.distributed.tensor.experimental import context_parallel

        ids, positions, labels = parts = [t.clone() for t in self.whole]
        cut = contextlib.nullcontext()
        if self.mesh.size() > 1:
            cut = context_parallel(
                self.mesh, buffers=parts, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(parts)
            )
        with cut:
            loss = model(
                input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels
            ).loss
            finish(loss)
        return loss.detach()


def _causal(module, args, kwargs):
    return args, kwargs | {"attention_mask": None, "is_causal": True}


def work(case: tuple, engine: str, variant: str) -> dict:
    """Return rank 0's report of its group: milliseconds, GiB, share of communication, loss."""
    cuda = case[0] != "tiny"
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        model = build(case, variant, device)
        vocab = model.config.vocab_size
        if engine == "fsdp2+cp":
            batch = SharedSequence(model, vocab, case[2], device)
        else:
            batch = WholeBatch(vocab, case[2], device)
        model, finish = (zero3 if engine == "zero3" else fsdp2)(model)

        def step():
            return batch(model, finish)

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
        leave_group()


def _timed(step, cuda: bool) -> float:
    """Return the milliseconds of a step that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _communication(step, cuda: bool) -> float:
    """Return the milliseconds of a step in which NCCL kernels, or gloo operations, run."""
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
