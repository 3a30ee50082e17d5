"""Steps whose memory is activations, against their peers: python benchmarks/lora_step.py

Forward, backward and fused AdamW of a random model of the named shape in bf16, sdpa attention, no
checkpointing, half of the labels ignored. LoRA: rank 16 on every linear layer but the head, PEFT's
defaults (fp32 adapters), with and without bf16 autocast. Full fine-tuning: every parameter, bf16.

Tokens per second, peak GiB allocated, loss of the last step; each contender in its own process.

    plain   transformers and peft as they come
    liger   the same with liger-kernel's layers and loss
    keep    liger_trainer, activation_memory "keep"
    lean    liger_trainer

`--profile` prints where the device's time goes instead. `--smoke` runs tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from timing import environment, measure, print_table
from training_step import SHAPES

TINY = {
    **SHAPES["Llama-1B"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
CONTENDERS = ("plain", "liger", "keep", "lean")


class Case(NamedTuple):
    shape: str
    batch: int
    length: int = 4096
    lora: bool = True
    autocast: bool = False
    dropout: float = 0.0


CASES = {
    "LoRA Llama-8B, 2 x 4096": Case("Llama-8B", 2),
    "LoRA Llama-8B, 2 x 4096, autocast": Case("Llama-8B", 2, autocast=True),
    "LoRA Llama-8B, 2 x 4096, dropout 0.05": Case("Llama-8B", 2, dropout=0.05),
    "LoRA Llama-8B, 4 x 4096": Case("Llama-8B", 4),
    "LoRA Llama-8B, 1 x 512": Case("Llama-8B", 1, 512),
    "full Llama-1B, 8 x 4096": Case("Llama-1B", 8, lora=False),
    "full Llama-1B, 8 x 4096, autocast": Case("Llama-1B", 8, lora=False, autocast=True),
    "full Llama-1B, 4 x 512": Case("Llama-1B", 4, 512, lora=False),
    "full Llama-1B, 1 x 512": Case("Llama-1B", 1, 512, lora=False),
}


def build(case: Case, contender: str, smoke: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(TINY if smoke else SHAPES[case.shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device("cpu" if smoke else "cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    if contender == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        options = {"r": 16, "target_modules": "all-linear", "lora_dropout": case.dropout}
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    if contender in ("keep", "lean"):
        from liger_trainer import inject

        inject(model, {"activation_memory": contender}, strict=True)
    return model.train()


def run(name: str, contender: str, smoke: bool, profile: bool) -> str:
    case = CASES[name]
    if smoke:
        case = case._replace(batch=2, length=40)
    device = "cpu" if smoke else "cuda"
    model = build(case, contender, smoke)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (case.batch, case.length), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : case.length // 2] = -100
    losses = []

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    if smoke:
        start = time.perf_counter()
        for _ in range(6):
            step()
        return f"{time.perf_counter() - start:.1f} s, {losses[-1].item():.4f}"
    if profile:
        return kernel_times(step)
    ms, _ = measure(step, warmup=3, repeats=5 if case.length > 512 else 30)
    gib = torch.cuda.max_memory_allocated() / 2**30
    return f"{case.batch * case.length / ms * 1000:,.0f}, {gib:.1f}, {losses[-1].item():.4f}"


def kernel_times(step) -> str:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90
    )
    print(table, file=sys.stderr)
    return "profiled"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--profile", action="store_true", help="device time by kernel")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one, options.smoke, options.profile)))
        return
    flags = ["--smoke"] * options.smoke + ["--profile"] * options.profile
    rows = []
    for name in options.cases:
        row = [name]
        for contender in options.contenders:
            if contender == "liger" and (
                options.smoke or importlib.util.find_spec("liger_kernel") is None
            ):
                row.append("skipped: needs liger-kernel and a GPU")
                continue
            command = [sys.executable, __file__, "--one", name, contender, *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            failure = (done.stderr.strip().splitlines() or ["no output"])[-1][:80]
            row.append(failure if done.returncode else json.loads(done.stdout.splitlines()[-1]))
            if options.profile or done.returncode:
                print(name, contender, done.stderr, sep="\n", file=sys.stderr)
        rows.append(row)
        print(row, flush=True)
    print(environment())
    print_table("Training step, tokens/s, peak GiB, loss", ["case", *options.contenders], rows)


if __name__ == "__main__":
    main()
