"""Training with TRL against its peers: python benchmarks/trl_step.py

    python benchmarks/trl_step.py --processes 2 --accelerate fsdp2    # or ddp, zero2, zero3

Whole steps of TRL's trainers as they train: data loader, forward, backward, fused AdamW, TRL's own
metrics. A random model of Llama-3.2-1B's shape, nothing checkpointed, or of Llama-3.1-8B's, every
layer checkpointed; bf16 weights under TRL's bf16 autocast, sdpa attention. Tokens per second, the
prompts' included, and peak GiB allocated; each contender runs in its own process. The reference of
DPO is a copy of the policy at the start. With several processes each has the named batch, tokens
are counted over all of them, and the peak is that of the largest; `accelerate launch` starts them
with the configuration of that name.

Mean loss and last gradient norm must be those of the first contender, or there is no figure.
`--smoke` trains tiny models on the CPU.

    TRL                  TRL's trainers as they come
    TRL + liger layers   the same with use_liger_kernel=True: TRL's head, liger-kernel's layers
    liger_trainer        `liger_trainer.trl` with use_liger_kernel=True
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from timing import add_case_option, chosen_cases, environment, print_table
from training_step import SHAPES

CONTENDERS = ("TRL", "TRL + liger layers", "liger_trainer")
SMOKE_SHAPE = {
    **SHAPES["Llama-1B"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
WARMUP, MEASURED = 3, 6
LEARNING_RATES = {"SFT": 1e-5, "DPO": 1e-6}
# Relative, of loss and gradient norm. In bf16 a sum of 1024 log-probabilities is uncertain by about
# one, and DPO's loss by its tenth (beta), where policy and reference round at different places.
TOLERANCES = {"SFT": (0.02, 0.1), "DPO": (0.15, 0.1)}
SMOKE_TOLERANCES = (1e-3, 1e-3)
ANOTHER = "another result"
RECIPES = Path(__file__).parents[1] / "recipes"


class Case(NamedTuple):
    method: str
    batch: int  # sequences, or pairs
    length: int
    prompt: float  # fraction of a sequence that is not trained on
    shape: str = "Llama-1B"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length * (2 if self.method == "DPO" else 1)


CASES = {
    "SFT, 8 x 4096": Case("SFT", 8, 4096, 0.0),
    "SFT, 8 x 4096, 60% of labels ignored": Case("SFT", 8, 4096, 0.6),
    "DPO, 4 pairs x 2048, half prompt": Case("DPO", 4, 2048, 0.5),
    "Llama-8B, SFT, 2 x 4096": Case("SFT", 2, 4096, 0.0, "Llama-8B", checkpointing=True),
    "Llama-8B, DPO, 2 pairs x 2048, half prompt": Case(
        "DPO", 2, 2048, 0.5, "Llama-8B", checkpointing=True
    ),
}


def sized(name: str, smoke: bool) -> Case:
    return CASES[name]._replace(batch=2, length=40) if smoke else CASES[name]


# --- one process: a trainer and its steps ----------------------------------------------------


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def build_model(shape: dict, smoke: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device("cpu" if smoke else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if smoke else torch.bfloat16, attn_implementation="sdpa"
        )


def build_tokenizer(vocab: int):
    """Return a tokenizer in which token i is the word "i"; the last two are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def build_data(case: Case, vocab: int, batches: int):
    """Return random sequences of exactly `case.length` tokens."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    prompt = int(case.prompt * case.length)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab - 2, (length,), generator=generator).tolist()

    def words(length: int) -> str:
        return " ".join(str(token) for token in draw(length))

    rows = []
    for _ in range(case.batch * batches):
        if case.method == "SFT":
            ids = draw(case.length)
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        else:
            answer = case.length - prompt - 1  # TRL appends <eos>
            row = {"chosen": " " + words(answer), "rejected": " " + words(answer)}
            rows.append({"prompt": words(prompt), **row})
    return Dataset.from_list(rows)


def build_trainer(case: Case, contender: str, smoke: bool, folder: str, callback):
    home = importlib.import_module("liger_trainer.trl" if contender == "liger_trainer" else "trl")
    shape = SMOKE_SHAPE if smoke else SHAPES[case.shape]
    steps = WARMUP + MEASURED
    config = getattr(home, f"{case.method}Config")(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=case.batch,
        max_length=case.length,
        learning_rate=LEARNING_RATES[case.method],
        optim="adamw_torch_fused",
        bf16=not smoke,
        gradient_checkpointing=case.checkpointing,
        use_liger_kernel=contender != "TRL",
        use_cpu=smoke,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not smoke,
    )
    arguments = {"ref_model": build_model(shape, smoke)} if case.method == "DPO" else {}
    return getattr(home, f"{case.method}Trainer")(
        model=build_model(shape, smoke),
        args=config,
        train_dataset=build_data(case, shape["vocab_size"], steps * processes()),
        processing_class=build_tokenizer(shape["vocab_size"]),
        callbacks=[callback],
        **arguments,
    )


def build_clock():
    """Return a callback that records the time after every step, once the device has finished it."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if len(self.ends) == WARMUP and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def seconds(self) -> float:
            ends = self.ends[WARMUP - 1 :]
            return statistics.median(b - a for a, b in itertools.pairwise(ends))

    return Clock()


def run(case: Case, contender: str, smoke: bool) -> dict[str, float]:
    clock = build_clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(case, contender, smoke, folder, clock)
        trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    tokens = case.tokens * processes() * (WARMUP + MEASURED)
    if log["num_tokens"] != tokens:
        raise RuntimeError(f"{log['num_tokens']:.0f} tokens were trained on, not {tokens}")
    if contender == "liger_trainer":
        report = trainer.injection_report
        if report is None or report.refused or not report.coverage:
            raise RuntimeError(f"the model is not wholly on liger_trainer's kernels:\n{report}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    peaks = trainer.accelerator.gather(torch.tensor([peak], device=trainer.accelerator.device))
    return {
        "tokens per second": case.tokens * processes() / clock.seconds(),
        "gib": peaks.max().item(),
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
    }


# --- all of them -----------------------------------------------------------------------------


def missing(contender: str, smoke: bool) -> str | None:
    """Return why a contender cannot run, or None."""
    if importlib.util.find_spec("trl") is None:
        return "skipped: trl is not installed"
    if contender == "TRL + liger layers":
        if importlib.util.find_spec("liger_kernel") is None:
            return "skipped: liger-kernel is not installed"
        if smoke:
            return "skipped: liger-kernel needs a GPU"
    return None


def start(name: str, contender: str, options: argparse.Namespace) -> dict | str:
    """Run `run` in its own processes; return its result, or the last line of its error."""
    command = [__file__, "--one", name, contender, *["--smoke"] * options.smoke]
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    changes = dict.fromkeys(offline, "1")
    if options.processes > 1:
        configuration = RECIPES / "accelerate" / f"{options.accelerate}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(configuration)]
        launcher += [
            "--main_process_port",
            "0",
            "--num_processes",
            str(options.processes),
            *["--cpu"] * options.smoke,
        ]
        command = [sys.executable, *launcher, *command]
    else:  # TRL refuses DataParallel
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        changes["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, *command]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **changes}
    )
    if done.returncode == 0:
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))
    print(done.stderr, file=sys.stderr)
    errors = re.findall(r"^(?:\[rank\d+\]: ?)?(\S*Error\b.*)", done.stderr, re.M)
    return f"failed: {(errors or done.stderr.strip().splitlines() or ['no output'])[-1][:80]}"


def is_other(found: dict, truth: dict, tolerances: tuple[float, float]) -> bool:
    return not all(
        abs(found[key] - truth[key]) <= tolerance * abs(truth[key])
        for key, tolerance in zip(("loss", "grad_norm"), tolerances, strict=True)
    )


def compete(name: str, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the rows of the two tables."""
    figures, checks, truth = [name], [name], None
    tolerances = SMOKE_TOLERANCES if options.smoke else TOLERANCES[CASES[name].method]
    for contender in options.contender:
        found = missing(contender, options.smoke) or start(name, contender, options)
        if isinstance(found, str):
            figures.append(found)
            checks.append("")
            continue
        truth = truth or found
        checks.append(f"{found['loss']:.4f}, {found['grad_norm']:.4g}")
        figure = f"{found['tokens per second']:,.0f}, {found['gib']:.1f}"
        figures.append(ANOTHER if is_other(found, truth, tolerances) else figure)
    return figures, checks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--processes", type=int, default=1, help="one per GPU")
    parser.add_argument("--accelerate", default="ddp", choices=("ddp", "fsdp2", "zero2", "zero3"))
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("needs a CUDA device; --smoke runs without one")
    if options.one:
        name, contender = options.one
        found = run(sized(name, options.smoke), contender, options.smoke)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found), flush=True)
        return
    rows, checks = [], []
    for name in chosen_cases(CASES, options.case):
        row, check = compete(name, options)
        rows.append(row)
        checks.append(check)
        print(row, flush=True)
    print(environment())
    columns = ["case", *options.contender]
    size = " (tiny models)" if options.smoke else ""
    engine = f", {options.accelerate} on {options.processes} GPUs" * (options.processes > 1)
    print_table(f"Training with TRL{engine}, tokens/s, peak GiB{size}", columns, rows)
    print_table("Mean loss, last gradient norm", columns, checks)
    if options.smoke and any(ANOTHER in row or "failed" in " ".join(row) for row in rows):
        raise SystemExit("a contender failed or trains something else")


if __name__ == "__main__":
    main()
