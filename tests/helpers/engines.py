"""Every engine against one process, on two or four: python tests/helpers/engines.py

Each cell trains a tiny model for one step of two micro-batches under an engine, the kernels
injected, and compares with the plain model on one process that saw all processes' data: losses,
and every weight after the step. *fused*: the head was never called for its plain logits, which is
counted, and after the step the report says of the same sites as on one process that they ran fused.
Kernels run at every size. A row that the plain model cannot run either says so.

    rows       the engine, as users start it (engine_rows.py)
    columns    how the loss is made: in the forward (labels), outside it (a loss scope around a
               loss of one's own), from token log-probabilities (what TRL's trainers use), beside a
               term of one's own on outputs.logits, and with LoRA on every linear layer, the head
               included

`--engines NAME ...` chooses rows, `--columns NAME ...` columns, `--json FILE` writes the cells.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from unittest import mock

import plain_heads
import torch
import torch.distributed as dist
import transformers.utils.logging
from engine_rows import ENGINES, Engine
from processes import start
from small import LENGTH, LOSSES, LR, MICRO, VOCAB, tiny
from torch import nn

TOLERANCE = 2e-5


CELLS = [
    *((name, tied, "full") for name in LOSSES for tied in (False, True)),
    *((name, False, "LoRA") for name in ("labels", "own loss", "log-probabilities")),
]


# --- one cell -------------------------------------------------------------------------------------


def batches(rank: int):
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * rank + step)
        ids = torch.randint(3, VOCAB, (MICRO, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, : 2 + rank + step] = -100  # uneven token counts
        yield ids, labels


@functools.cache
def on_one_process(loss_of, tied: bool, kind: str, shards: int):
    """Return losses, and weights after a step, on the data of all `shards`."""
    model = tiny(tied, kind)
    losses = []
    for shard in range(shards):
        for ids, labels in batches(shard):
            loss = loss_of(model, ids, labels) / 2
            (loss / shards).backward()
            losses.append(loss.item())
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= LR * p.grad
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def train(engine: nn.Module, loss_of, shard: int) -> list[float]:
    losses = []
    is_deepspeed = hasattr(engine, "zero_optimization_stage")
    for step, (ids, labels) in enumerate(batches(shard)):
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
    """Return the gathered parameters after the step, by their plain names."""
    from torch.distributed.tensor import DTensor

    found = {}
    if type(engine).__name__ == "FullyShardedDataParallel":
        with type(engine).summon_full_params(engine):
            for name, p in engine.named_parameters():
                found[name.replace("_fsdp_wrapped_module.", "")] = p.detach().clone()
        return found
    for name, p in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        if hasattr(p, "ds_shape"):
            import deepspeed as ds

            with ds.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def run_cell(row: Engine, name: str, tied: bool, kind: str) -> str:
    """Return "= and fused", or what is wrong."""
    from liger_trainer import inject
    from liger_trainer.kernels.runtime import every_size

    model = row.make(tied, kind)
    report = inject(model)
    refused = [r for r in report.refused if r.rule == "fused_linear_cross_entropy"]
    with plain_heads.counted() as calls, every_size():
        found = errors(row, model, name, tied, kind)
    kept = sites_on_one_process(tied, kind) - swapped_sites(report)  # amended as it runs
    allowed = {key: TOLERANCE if key == "losses" else 1e-3 for key in found}
    if row.rounds:
        plain = errors(row, row.make(tied, kind), name, tied, kind)
        allowed = {key: most + 1.5 * plain[key] for key, most in allowed.items()}
    wrong = [f"{k} off by {e:.1e}" for k, e in found.items() if not e <= allowed[k]]
    if wrong:
        return "WRONG: " + "; ".join(wrong[:3])
    if refused:
        return f"=, refused: {refused[0].reason}"
    if kept:
        return f"=, not swapped: {sorted(kept)[0]}"
    expected_calls = 2 if name == "own term" else 0
    made = calls.call_count
    return "=, fused" if made <= expected_calls else f"=, {made} plain head calls"


def swapped_sites(report) -> set[tuple[str, str]]:
    return {(row.site, row.rule) for row in report.rows if row.swapped}


@functools.cache
def sites_on_one_process(tied: bool, kind: str) -> set[tuple[str, str]]:
    from liger_trainer import inject

    return swapped_sites(inject(tiny(tied, kind)))


def errors(row: Engine, model: nn.Module, name: str, tied: bool, kind: str) -> dict[str, float]:
    """Train `model` under the engine; how far losses, and steps of the weights, are from those of
    one process."""
    shard = dist.get_rank() // row.shares
    expected_losses, expected = on_one_process(LOSSES[name], tied, kind, row.world // row.shares)
    initial = dict(tiny(tied, kind).named_parameters())
    engine = row.prepare(model)
    losses = mean_of_neighbors(train(engine, row.losses[name], shard), row.shares)
    got = whole_weights(engine, model)
    mine = expected_losses[2 * shard : 2 * shard + 2]
    found = {"losses": max(abs(a - b) for a, b in zip(losses, mine, strict=True))}
    for key, value in expected.items():
        step = (value - initial[key]).norm()
        found[key] = ((got[key] - value).norm() / (step + 1e-4)).item()
    return found


def mean_of_neighbors(losses: list[float], shares: int) -> list[float]:
    """Return the mean over the ranks that see the same data."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    first = dist.get_rank() // shares * shares
    return torch.tensor(everyone[first : first + shares], dtype=torch.float64).mean(0).tolist()


def plain_cell(row: Engine, name: str, tied: bool, kind: str) -> str:
    """Return whether the plain model runs under the engine."""
    try:
        engine = row.prepare(row.make(tied, kind))
        train(engine, row.losses[name], dist.get_rank() // row.shares)
    except Exception as error:
        return f"plain too: {type(error).__name__}"
    return ""


def column_of(name: str, tied: bool, kind: str) -> str:
    return f"{name}, {'tied' if tied else kind}"


COLUMNS = [column_of(*cell) for cell in CELLS]


def row_of(engine: str, columns: list[str]) -> dict[str, str]:
    """Return the cells of an engine: what the first process found wrong, of all."""
    cells = {}
    for name, tied, kind in CELLS:
        if (column := column_of(name, tied, kind)) not in columns:
            continue
        try:
            answer = run_cell(ENGINES[engine], name, tied, kind)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0][:90]
            answer = f"{type(error).__name__}: {line}"
            if os.environ.get("MATRIX_TRACE"):
                raise
            answer += f" ({plain_cell(ENGINES[engine], name, tied, kind)})"
        answers: list = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
        cells[column] = max(answers, key=lambda a: a != "=, fused")
        if dist.get_rank() == 0:
            print(f"{engine} | {column} | {cells[column]}", flush=True)
    return cells


def worker(engines: list[str], columns: list[str], out: str) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rows = {}
    for engine in engines:
        with mock.patch.dict(os.environ):  # accelerate leaves its options there
            rows[engine] = row_of(engine, columns)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def run_matrix(engines: list[str], columns: list[str], out: str) -> dict[str, dict[str, str]]:
    """Run the rows; the cells are returned and written.

    Rows of as many processes share them, and what is computed once in a process. DeepSpeed's have
    their own: ZeRO-3 leaves functions of torch replaced.
    """
    together: dict[tuple, list[str]] = {}
    for name in engines:
        alone = name if "ZeRO" in name else None
        together.setdefault((ENGINES[name].world, alone), []).append(name)
    found = {}
    for (world, _), names in together.items():
        start(world, worker, names, columns, out)
        found |= json.loads(Path(out).read_text())
    cells = {name: found[name] for name in engines}
    Path(out).write_text(json.dumps(cells, indent=1))
    return cells


def as_table(cells: dict[str, dict[str, str]]) -> str:
    columns = list(next(iter(cells.values())))
    lines = [["engine", *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(values[c] for c in columns)] for row, values in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--columns", nargs="+", default=COLUMNS)
    parser.add_argument("--json", default="engines.json")
    chosen = parser.parse_args()
    print(as_table(run_matrix(chosen.engines, chosen.columns, chosen.json)))
