"""A whole training step against its peers: python benchmarks/training_step.py

Forward, backward and fused AdamW of a random model of the named shape, bf16 weights, sdpa
attention. Each cell: how many times the tokens per second of transformers (of plain PEFT, where
there are adapters), tokens per second, peak GiB allocated.

    python benchmarks/training_step.py --case small --contender liger-trainer transformers
    python benchmarks/training_step.py --case "LoRA Llama-8B" --flags '{"rope": false}'

Every contender has a process of its own. In a small case they all are alive and take turns, so that
a busy host slows all of them; in a large one they run one after another. Losses after the warm-up
must be that of the first contender, or there is no figure. `--json FILE` keeps the results and adds
to those of earlier calls; the table shows all of them. `--smoke` runs tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from timing import add_case_option, chosen_cases, environment, print_table

from liger_trainer.runs.planning.shapes import config_of

SHAPES = {
    "SmolLM2-135M": config_of("smollm2-135m"),
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Llama-1B": config_of("llama-1b"),
    "Qwen3-1.7B": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Llama-8B": config_of("llama-8b"),
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


class Case(NamedTuple):
    shape: str
    batch: int
    length: int
    ignored: float = 0.0  # fraction of the labels
    lora: bool = False  # adapters of rank 16 on every linear layer
    quantized: bool = False  # linear layers in 4 bits of bitsandbytes (QLoRA)
    autocast: bool = False
    checkpointing: bool = False
    documents: int = 1  # packed into each row
    budget: int | None = None  # GiB that the device is made to have; peers checkpoint all layers
    small: bool = False


LARGE = {
    "Llama-1B, 8 x 4096": Case("Llama-1B", 8, 4096),
    "Llama-1B, 8 x 4096, 60% ignored": Case("Llama-1B", 8, 4096, 0.6),
    "Llama-1B, 8 x 4096, 8 documents a row": Case("Llama-1B", 8, 4096, documents=8),
    "Llama-1B, 1 x 32768, checkpointed": Case("Llama-1B", 1, 32768, checkpointing=True),
    "Qwen3-1.7B, 4 x 4096": Case("Qwen3-1.7B", 4, 4096),
    "Llama-8B, 4 x 4096, checkpointed": Case("Llama-8B", 4, 4096, checkpointing=True),
    "Llama-8B, 4 x 4096, 80 GiB": Case("Llama-8B", 4, 4096, budget=80),
    "LoRA Llama-8B, 2 x 4096": Case("Llama-8B", 2, 4096, 0.5, lora=True),
    "LoRA Llama-8B, 2 x 4096, autocast": Case("Llama-8B", 2, 4096, 0.5, lora=True, autocast=True),
    "LoRA Llama-8B, 4 x 4096, 80 GiB": Case("Llama-8B", 4, 4096, 0.5, lora=True, budget=80),
    "LoRA Llama-8B, 2 x 4096, 8 documents a row": Case(
        "Llama-8B", 2, 4096, 0.5, lora=True, documents=8
    ),
    "QLoRA Llama-8B, 2 x 4096": Case("Llama-8B", 2, 4096, 0.5, lora=True, quantized=True),
}
SMALL = {
    f"small: {'LoRA ' if lora else ''}{shape}, {batch} x {length}": Case(
        shape, batch, length, lora=lora, small=True
    )
    for shape, (batch, length), lora in itertools.product(
        ("Llama-1B", "SmolLM2-135M", "Qwen3-0.6B"),
        ((1, 128), (1, 512), (4, 512), (8, 512)),
        (False, True),
    )
}
CASES = LARGE | SMALL


class Contender(NamedTuple):
    kernels: str | None
    compiled: bool = False


CONTENDERS = {
    "transformers": Contender(None),
    "torch.compile": Contender(None, compiled=True),
    "liger-kernel": Contender("liger-kernel"),
    "liger-trainer": Contender("liger-trainer"),
    "liger-trainer + compile": Contender("liger-trainer", compiled=True),
}
WARMUP = 4
TOLERANCE = 0.02  # relative, of the loss after the warm-up
ANOTHER = "another result"


# --- one process: a model and its steps -------------------------------------------------------


def build(case: Case, smoke: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = SHAPES[case.shape] | (TINY if smoke else {})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cpu" if smoke else "cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if smoke else torch.bfloat16, attn_implementation="sdpa"
        )
    if case.quantized and not smoke:
        quantize(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora:
        import peft

        config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        if case.checkpointing:
            model.enable_input_require_grads()
    return model.train()


def quantize(model) -> None:
    """Replace the linear layers of `model` by 4-bit ones, as `load_in_4bit` does for a checkpoint.
    The head stays as it is."""
    import bitsandbytes as bnb

    for parent in model.base_model.modules():
        for name, linear in parent.named_children():
            if isinstance(linear, torch.nn.Linear):
                quantized = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    compute_dtype=linear.weight.dtype, quant_type="nf4",
                )  # fmt: skip
                quantized.load_state_dict(linear.state_dict())
                parent.register_module(name, quantized.cuda())
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layers


def equip(model, contender: Contender, flags: dict):
    if contender.kernels == "liger-trainer":
        from liger_trainer import inject

        inject(model, flags, strict=True)
    elif contender.kernels == "liger-kernel":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        _apply_liger_kernel_to_instance(model=inner)
    return torch.compile(model) if contender.compiled else model


def batch(case: Case, vocab: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length)
    ids = torch.randint(0, vocab, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < case.ignored
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}
    if case.documents > 1:
        cuts = torch.rand(shape, generator=generator).argsort(1)[:, : case.documents - 1]
        start = torch.zeros(shape, dtype=torch.long).scatter_(1, cuts, cuts).cummax(1).values
        inputs["position_ids"] = torch.arange(case.length) - start
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def work(case: Case, contender: Contender, flags: dict, smoke: bool) -> None:
    """Warm up, say so; then for each line of standard input, which holds a number of steps, print
    their milliseconds. Prints JSON lines."""
    device = "cpu" if smoke else "cuda"
    if case.budget and not smoke:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.budget * 2**30 / total))
        if contender.kernels == "liger-trainer":
            flags = {"activation_memory": "auto"} | flags
        else:
            case = case._replace(checkpointing=True)
    model = build(case, smoke)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    forward = equip(model, contender, flags)
    inputs = batch(case, model.config.vocab_size, device)
    cast = torch.autocast(device, torch.bfloat16, enabled=case.autocast)

    def step():
        with cast:
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(WARMUP):
        loss = step()
    print(json.dumps({"loss": float(loss)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(step, int(line), smoke)), flush=True)


def timed(step, count: int, smoke: bool) -> dict:
    """Return the milliseconds of each step, and the peak GiB."""
    if smoke:
        ends = [time.perf_counter()]
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return {"ms": [1000 * (b - a) for a, b in itertools.pairwise(ends)], "gib": 0.0}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    ms = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return {"ms": ms, "gib": torch.cuda.max_memory_allocated() / 2**30}


# --- all of them ------------------------------------------------------------------------------


class Worker:
    """The process of a contender in a case; a context manager that ends it."""

    def __init__(self, case: str, contender: str, options: argparse.Namespace):
        command = [sys.executable, __file__, "--one", case, contender, "--flags", options.flags]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *["--smoke"] * options.smoke],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.failure: str | None = None
        self.result: dict = {}
        self.ms: list[float] = []

    def answer(self, deadline: float) -> dict:
        """Return the next line of the process; None, with `failure` set, if it fails or is late."""
        late = threading.Event()
        timer = threading.Timer(
            max(0.0, deadline - time.monotonic()), lambda: (late.set(), self.process.kill())
        )
        timer.start()
        line = next((text for text in self.process.stdout if text.startswith("{")), "")
        timer.cancel()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["no output"]
        self.failure = "too slow" if late.is_set() else lines[-1][:70]
        return {}

    def measure(self, steps: int, deadline: float) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self.answer(deadline)
        self.ms += found.get("ms", [])
        self.result["gib"] = found.get("gib")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.errors.close()


def compete(name: str, contenders: list[str], options: argparse.Namespace) -> dict[str, dict]:
    """Return tokens per second, peak GiB and loss of every contender, or why there are none."""
    case = sized(name, options.smoke)
    groups = [contenders] if case.small else [[contender] for contender in contenders]
    rounds, steps = (8, 6) if case.small else (1, 5)
    found = {}
    for group in groups:
        deadline = time.monotonic() + options.limit
        with contextlib.ExitStack() as alive:
            workers = {c: alive.enter_context(Worker(name, c, options)) for c in group}
            for worker in workers.values():  # they warm up at the same time
                worker.result = worker.answer(deadline)
            for _ in range(rounds):
                for worker in workers.values():
                    if worker.failure is None:
                        worker.measure(steps, deadline)
            for contender, worker in workers.items():
                if worker.failure:
                    found[contender] = {"failure": worker.failure}
                else:
                    rate = 1000 * case.batch * case.length / statistics.median(worker.ms)
                    found[contender] = {"tokens/s": rate, **worker.result}
    return found


def cell(name: str, results: dict[str, dict]) -> str:
    """Return a table cell: a contender's figure, relative to the first contender's."""
    found = results.get(name)
    if found is None or "failure" in found:
        return "" if found is None else found["failure"]
    first = next(r for r in results.values() if "failure" not in r)
    if abs(found["loss"] - first["loss"]) > TOLERANCE * abs(first["loss"]):
        return f"{ANOTHER}: loss {found['loss']:.4f}, not {first['loss']:.4f}"
    figure = f"{found['tokens/s']:,.0f} tok/s, {found['gib']:.1f} GiB"
    if "tokens/s" not in (base := results.get("transformers", {})):
        return figure
    return f"{found['tokens/s'] / base['tokens/s']:.2f}x, {figure}"


def sized(name: str, smoke: bool) -> Case:
    return CASES[name]._replace(batch=2, length=64) if smoke else CASES[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--flags", default="{}", help="liger_kernel_config of liger-trainer, JSON")
    parser.add_argument(
        "--limit",
        type=float,
        default=500,
        help="seconds a small case or one contender may take",
    )
    parser.add_argument("--json", type=Path, help="file that keeps all results")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("needs a CUDA device; --smoke runs without one")
    if options.one:
        name, contender = options.one
        flags = json.loads(options.flags)
        work(sized(name, options.smoke), CONTENDERS[contender], flags, options.smoke)
        return
    results = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["results"]
    for name in chosen_cases(CASES, options.case):
        results.setdefault(name, {}).update(compete(name, options.contender, options))
        print(name, results[name], flush=True)
        if options.json:
            kept = {"environment": environment(), "results": results}
            options.json.write_text(json.dumps(kept, indent=1))
    print(environment())
    rows = [[name, *(cell(c, found) for c in CONTENDERS)] for name, found in results.items()]
    print_table("Training step", ["case", *CONTENDERS], rows)
    if options.smoke and any("tok/s" not in c for row in rows for c in row[1:] if c):
        raise SystemExit("a contender failed or trains something else")


if __name__ == "__main__":
    main()
