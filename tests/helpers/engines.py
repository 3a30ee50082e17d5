"""Every engine against one process, on two CPU processes: python tests/helpers/engines.py --matrix

Each cell trains a tiny model for one step of two micro-batches under an engine, the kernels
injected, and compares with the plain model on one process that saw both processes' data: losses,
and every weight after the step. *fused* is counted while it runs: the head was never called for
its plain logits. A row that the plain model cannot run either says so.

    rows       the engine, as users start it
    columns    how the loss is made: in the forward (labels), outside it (a loss scope around a
               loss of one's own), from token log-probabilities (what TRL's trainers use), beside a
               term of one's own on outputs.logits, and with LoRA on every linear layer, the head
               included

`--engines NAME ...` chooses rows, `--json FILE` writes the cells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

WORLD, MICRO, LENGTH, VOCAB, LR = 2, 2, 12, 128, 0.05
TOLERANCE = 2e-5


# --- engines --------------------------------------------------------------------------------------


def ddp(**options):
    def prepare(model):
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, **options)

    return prepare


def fsdp2(layout: str, **options):
    """`layout`: where the head lives: in the root, with the final norm, or a unit of its own."""

    def prepare(model):
        from torch.distributed.fsdp import fully_shard

        inner = base_of(model)
        tied = inner.lm_head_weight_is_tied
        root = {k: v for k, v in options.items() if k != "root_resharded"}
        for layer in inner.model.layers:
            fully_shard(layer, **root)
        head = inner.get_output_embeddings()
        tail = [inner.model.norm, *([inner.model.embed_tokens] if tied else []), head]
        if layout == "tail":
            fully_shard(tail, **root | {"reshard_after_forward": False})
        elif layout == "head":
            if tied:
                raise NotImplementedError("torch refuses a tied head as a unit of its own")
            fully_shard(head, **root)
        resharded = options.get("root_resharded")
        root = {k: v for k, v in root.items() if k != "reshard_after_forward"}
        if resharded:
            root["reshard_after_forward"] = True
        return fully_shard(model, **root)

    return prepare


def fsdp1():
    def prepare(model):
        import functools

        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        layer = type(base_of(model).model.layers[0])
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )

    return prepare


def deepspeed(stage: int, **options):
    def prepare(model):
        import deepspeed as ds

        config = {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **options},
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        wanted = [p for p in model.parameters() if p.requires_grad]
        config.pop("optimizer")
        optimizer = torch.optim.SGD(wanted, lr=LR)
        engine, *_ = ds.initialize(
            model=model, config=config, optimizer=optimizer, dist_init_required=False
        )
        return engine

    return prepare


ENGINES: dict[str, Callable] = {
    "DDP": ddp(),
    "DDP, find_unused_parameters": ddp(find_unused_parameters=True),
    "DDP, bucket views": ddp(gradient_as_bucket_view=True),
    "FSDP2, head with the final norm": fsdp2("tail"),
    "FSDP2, head with the final norm, layers kept": fsdp2("tail", reshard_after_forward=False),
    "FSDP2, head in the root": fsdp2("root"),
    "FSDP2, head in the root, resharded": fsdp2("root", root_resharded=True),
    "FSDP2, head a unit": fsdp2("head"),
    "FSDP1": fsdp1(),
    "ZeRO-1": deepspeed(1),
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3, stage3_param_persistence_threshold=0),
    "ZeRO-3, small parameters kept": deepspeed(3, stage3_param_persistence_threshold=1000),
}


# --- losses ---------------------------------------------------------------------------------------


def in_the_forward(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


def outside(model, ids, labels):
    from liger_trainer import loss_scope

    with loss_scope():
        logits = model(input_ids=ids).logits
        rows = logits[:, :-1].reshape(-1, VOCAB).float()
        return F.cross_entropy(rows, labels[:, 1:].flatten(), label_smoothing=0.1)


def from_log_probs(model, ids, labels):
    """Pairs of a preference loss."""
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
CELLS = [
    *((name, tied, "full") for name in LOSSES for tied in (False, True)),
    *((name, False, "LoRA") for name in ("labels", "own loss", "log-probabilities")),
]


# --- one cell -------------------------------------------------------------------------------------


def tiny(tied: bool, kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
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


def batches(rank: int):
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * rank + step)
        ids = torch.randint(3, VOCAB, (MICRO, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, : 2 + rank + step] = -100  # uneven token counts
        yield ids, labels


def on_one_process(loss_of, tied: bool, kind: str):
    model = tiny(tied, kind)
    losses = []
    for rank in range(WORLD):
        for ids, labels in batches(rank):
            loss = loss_of(model, ids, labels) / 2
            (loss / WORLD).backward()
            losses.append(loss.item())
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= LR * p.grad
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def train(engine: nn.Module, loss_of, rank: int) -> list[float]:
    losses = []
    is_deepspeed = hasattr(engine, "zero_optimization_stage")
    for step, (ids, labels) in enumerate(batches(rank)):
        last = step == 1
        if hasattr(engine, "no_sync") and not is_deepspeed and not last:
            with engine.no_sync():
                loss = loss_of(engine, ids, labels) / 2
                loss.backward()
        else:
            if hasattr(engine, "set_requires_gradient_sync"):
                engine.set_requires_gradient_sync(last)
            loss = loss_of(engine, ids, labels) / 2
            engine.backward(2 * loss) if is_deepspeed else loss.backward()
        losses.append(loss.item())
        if is_deepspeed:
            engine.step()
    if not is_deepspeed:
        torch.optim.SGD([p for p in engine.parameters() if p.requires_grad], lr=LR).step()
    return losses


def whole_weights(engine: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters after the step, gathered, by their plain names."""
    from torch.distributed.tensor import DTensor

    found = {}
    if type(engine).__name__ == "FullyShardedDataParallel":
        with type(engine).summon_full_params(engine):
            for name, p in engine.named_parameters():
                found[name.replace("_fsdp_wrapped_module.", "")] = p.detach().clone()
        return found
    for name, p in model.named_parameters():
        if hasattr(p, "ds_shape"):
            import deepspeed as ds

            with ds.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def run_cell(prepare, name: str, tied: bool, kind: str) -> str:
    """= and fused, or what is wrong."""
    from liger_trainer import inject
    from liger_trainer.deferred import logits as deferred

    rank = dist.get_rank()
    expected_losses, expected = on_one_process(LOSSES[name], tied, kind)
    initial = dict(tiny(tied, kind).named_parameters())

    model = tiny(tied, kind)
    report = inject(model)
    if report.coverage["fused_linear_cross_entropy"] != (1, 1):
        return f"refused: {report.refused}"
    calls = []
    original = deferred.plain_call
    deferred.plain_call = lambda *args: calls.append(1) or original(*args)
    try:
        engine = prepare(model)
        losses = train(engine, LOSSES[name], rank)
        got = whole_weights(engine, model)
    finally:
        deferred.plain_call = original
    wrong = []
    mine = expected_losses[2 * rank : 2 * rank + 2]
    if max(abs(a - b) for a, b in zip(losses, mine, strict=True)) > TOLERANCE:
        wrong.append(f"losses {losses} for {mine}")
    for key, value in expected.items():
        step = (value - initial[key]).abs().max()
        error = (got[key] - value).abs().max()
        if error > 1e-3 * step + 1e-7:
            wrong.append(f"{key} is off by {error / step.clamp_min(1e-12):.1e} of its step")
    if wrong:
        return "WRONG: " + "; ".join(wrong[:3])
    expected_calls = 2 if name == "own term" else 0
    return "=, fused" if len(calls) <= expected_calls else f"=, {len(calls)} plain head calls"


def plain_cell(prepare, name: str, tied: bool, kind: str) -> str:
    """Whether the plain model runs there."""
    try:
        engine = prepare(tiny(tied, kind))
        train(engine, LOSSES[name], dist.get_rank())
    except Exception as error:
        return f"plain too: {type(error).__name__}"
    return ""


def worker(engines: list[str], out: str | None) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = {}
    for engine in engines:
        for name, tied, kind in CELLS:
            column = f"{name}, {'tied' if tied else kind}"
            try:
                answer = run_cell(ENGINES[engine], name, tied, kind)
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0][:90]
                answer = f"{type(error).__name__}: {line}"
                if os.environ.get("MATRIX_TRACE"):
                    raise
                answer += f" ({plain_cell(ENGINES[engine], name, tied, kind)})"
            answers: list = [None] * WORLD
            dist.all_gather_object(answers, answer)
            rows.setdefault(engine, {})[column] = max(answers, key=lambda a: a != "=, fused")
            if dist.get_rank() == 0:
                print(f"{engine} | {column} | {rows[engine][column]}", flush=True)
    if dist.get_rank() == 0 and out:
        Path(out).write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def matrix(engines: list[str], out: str) -> dict[str, dict[str, str]]:
    """Run the rows in two processes and return the cells."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={WORLD}", __file__, "--json", out, "--engines", *engines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return json.loads(Path(out).read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--json")
    parser.add_argument("--matrix", action="store_true", help="start the two processes")
    arguments = parser.parse_args()
    if arguments.matrix:
        cells = matrix(arguments.engines, arguments.json or "engines.json")
        columns = list(next(iter(cells.values())))
        print("| engine | " + " | ".join(columns) + " |")
        print("|---|" + "---|" * len(columns))
        for row, values in cells.items():
            print(f"| {row} | " + " | ".join(values[c] for c in columns) + " |")
    else:
        worker(arguments.engines, arguments.json)
