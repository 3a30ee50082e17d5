"""A whole training step against its peers: python benchmarks/training_step.py

Forward, backward and fused AdamW of a random model of the named shape, pure bf16, sdpa attention.
Tokens per second (peak GiB allocated). Each contender runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from timing import environment, measure, print_table

SHAPES = {
    "Llama-1B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Llama-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
CASES = {  # shape, batch, length, fraction of labels ignored, checkpointing
    "Llama-1B, 8 x 4096": ("Llama-1B", 8, 4096, 0.0, False),
    "Llama-1B, 8 x 4096, 60% ignored": ("Llama-1B", 8, 4096, 0.6, False),
    "Llama-1B, 1 x 512": ("Llama-1B", 1, 512, 0.0, False),
    "Qwen3-1.7B, 4 x 4096": ("Qwen3-1.7B", 4, 4096, 0.0, False),
    "Llama-8B, 4 x 4096, checkpointed": ("Llama-8B", 4, 4096, 0.0, True),
}
CONTENDERS = ("liger_trainer", "HF eager", "liger", "torch.compile", "liger_trainer + compile")


def build(shape: str, checkpointing: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def equip(model, contender: str):
    if contender.startswith("liger_trainer"):
        from liger_trainer import inject

        inject(model, strict=True)
    elif contender == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if contender.endswith("compile"):
        model = torch.compile(model)
    return model


def run(case: str, contender: str) -> str:
    """Tokens per second and peak GiB."""
    shape, batch, length, ignored, checkpointing = CASES[case]
    torch.manual_seed(0)
    model = build(shape, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = equip(model, contender)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (batch, length), device="cuda")
    labels = ids.masked_fill(torch.rand(ids.shape, device="cuda") < ignored, -100)

    def step():
        forward(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ms, _ = measure(step, warmup=3, repeats=5 if batch > 1 else 30)
    return f"{batch * length / ms * 1000:,.0f}, {torch.cuda.max_memory_allocated() / 2**30:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    rows = []
    for case in options.cases:
        row = [case]
        for contender in options.contenders:
            command = [sys.executable, __file__, "--one", case, contender]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            failure = (done.stderr.strip().splitlines() or ["no output"])[-1][:60]
            row.append(failure if done.returncode else json.loads(done.stdout.splitlines()[-1]))
        rows.append(row)
        print(row, flush=True)
    print(environment())
    print_table("Training step, tokens/s, peak GiB", ["case", *options.contenders], rows)


if __name__ == "__main__":
    main()
