"""What a head that is split over two ranks does, beside its rows of the engine matrix.

Run by tests/injection/test_tensor_parallel.py: one JSON object with an answer for every check.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import plain_heads
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from transformers import PreTrainedModel

from liger_trainer import inject, loss_scope
from liger_trainer.runs.engine import leave_group

# How `split` asks transformers for a model's plan; older releases have another way.
IS_SUPPORTED = hasattr(PreTrainedModel, "_resolve_parallel_plans")

BATCH: dict[str, torch.Tensor] = {}  # on the device of the process, which `worker` chooses


def make_batch(device: str) -> None:
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    BATCH["input_ids"] = ids.to(device)
    BATCH["labels"] = ids.masked_fill(torch.arange(12) < 4, -100).to(device)


def tiny(vocab: int) -> nn.Module:
    small.VOCAB = vocab
    return small.tiny(False, "full").to(BATCH["labels"].device)


def mesh_of(*shape: int, **names) -> DeviceMesh:
    return dist.init_device_mesh(BATCH["labels"].device.type, shape, **names)


def split(model: nn.Module, mesh=None, **more: str) -> nn.Module:
    """Split `model` by its own plan, and by `more` styles."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=2))
    plan |= {name.replace("__", "."): style for name, style in more.items()}
    mesh = mesh_of(2) if mesh is None else mesh
    return apply_tensor_parallelism(model, mesh, plan)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the loss and the gathered gradients."""
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return {"loss": loss.detach(), **whole}


def largest_error(got: dict, expected: dict) -> float:
    return max(
        ((got[name] - value).norm() / value.norm()).item() for name, value in expected.items()
    )


def plain_calls(function) -> int:
    with plain_heads.counted() as calls:
        function()
    return calls.call_count


def head_row(report):
    return next(row for row in report.rows if row.rule == "fused_linear_cross_entropy")


def uneven() -> dict:
    """127 tokens: 64 rows on one rank, 63 on the other."""
    model, plain = split(tiny(127)), tiny(127)
    inject(model)
    found = {}
    calls = plain_calls(lambda: found.update(step(model)))
    return {"error": largest_error(found, step(plain)), "plain calls": calls}


def traffic() -> dict:
    """Gathers of a step, without and with the kernels."""
    counts = {}
    for injected in (False, True):
        model = split(tiny(128))
        if injected:
            inject(model)
        with CommDebugMode() as mode:
            model(**BATCH).loss.backward()
        gathers = [n for op, n in mode.get_comm_counts().items() if "all_gather" in str(op)]
        counts["injected" if injected else "plain"] = sum(gathers)
    return counts


def evaluation() -> dict:
    model, plain = split(tiny(127)).eval(), tiny(127).eval()
    inject(model)
    answers = {}

    @torch.no_grad()
    def evaluate():
        answers["loss"] = (model(**BATCH).loss - plain(**BATCH).loss).abs().item()

    answers["plain calls"] = plain_calls(evaluate)
    with torch.no_grad():
        expected = plain(input_ids=BATCH["input_ids"]).logits
        with loss_scope():
            answers["argmax"] = torch.equal(
                model(input_ids=BATCH["input_ids"]).logits.argmax(-1), expected.argmax(-1)
            )
            logits = model(input_ids=BATCH["input_ids"]).logits
            answers["plain calls of a mean"] = plain_calls(
                lambda: answers.update(mean=logits.mean())
            )
        answers["mean"] = (answers["mean"] - expected.mean()).abs().item()
        answers["logits"] = (model(**BATCH).logits - expected).abs().max().item()
    return answers


def norms() -> dict:
    """A norm of which each rank is given its part of the tokens."""
    styles = {"model__norm": "sequence_parallel"}
    model, plain = split(tiny(128), **styles), split(tiny(128), **styles)
    report = inject(model)
    row = next(row for row in report.rows if row.site == "model.norm")
    return {"error": largest_error(step(model), step(plain)), "swapped": row.swapped,
            "reason": row.reason}  # fmt: skip


def altered() -> dict:
    """A wrapper that does more than split: it must not be passed by."""
    model, plain = split(tiny(128)), split(tiny(128))
    for each in (model, plain):
        inner = each.lm_head.forward
        each.lm_head.forward = lambda x, inner=inner: 2 * inner(x)
    row = head_row(inject(model))
    return {"error": largest_error(step(model), step(plain)), "swapped": row.swapped,
            "reason": row.reason}  # fmt: skip


def rankless() -> dict:
    """One row for two ranks: the second has none."""
    head = nn.Linear(4, 1, bias=False)
    from torch.distributed.tensor import Shard, distribute_tensor

    from liger_trainer.deferred.vocab_parallel import shard_of

    return {"shard": shard_of(distribute_tensor(head.weight, mesh_of(2), [Shard(0)])) is not None}


def scattered() -> dict:
    """A head that data ranks shard as well, and whose weight is not gathered when it is needed."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(1, 2, mesh_dim_names=("data", "tensor"))
    model, plain = split(tiny(128), mesh["tensor"]), tiny(128)
    inject(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"], reshard_after_forward=True)
    answers = {"error": largest_error(step(model), step(plain))}
    for with_grad in (True, False):
        with loss_scope(), torch.set_grad_enabled(with_grad):
            logits = model(input_ids=BATCH["input_ids"]).logits[:, :-1].flatten(0, 1)
            for name, use in (("loss", F.cross_entropy), ("value", lambda z, _: z + 1)):
                try:
                    use(logits, BATCH["labels"][:, 1:].flatten())
                except RuntimeError as error:
                    answers[f"{name}, {with_grad}"] = str(error)
    return answers


CHECKS = (uneven, traffic, evaluation, norms, altered, rankless, scattered)


def worker(out: str, device: str) -> None:
    """What each process runs, on a device of its own; the first writes the answers."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    make_batch(device)
    answers = {check.__name__: check() for check in CHECKS}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(answers))
    dist.barrier()
    leave_group()
