"""Experts over two CPU processes, injected and plain: the same losses, gradients and report.

The model is sharded by `from_pretrained`, so it is injected afterwards. Writes what is wrong in
each case, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from families import tiny_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from liger_trainer import inject
from liger_trainer.deferred import Deferred
from liger_trainer.kernels.runtime import every_size
from liger_trainer.report import InjectionReport
from liger_trainer.runs.engine import leave_group

LAYOUTS = {
    "data and experts": {"fsdp_size": 2, "ep_size": 2},
    "tensors and experts": {"tp_size": 2, "ep_size": 2},
}


def step(folder: str, layout: dict[str, int], fused: bool):
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**layout)
    ).train()
    report = inject(model) if fused else None
    rank = dist.get_rank() if "fsdp_size" in layout else 0  # one batch for all, or one each
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 128, (2, 16), generator=generator)
    with every_size():
        out = model(input_ids=ids, labels=ids.masked_fill(ids % 3 == 0, -100))
        out.loss.backward()
    grads = {name: _whole(p.grad) for name, p in model.named_parameters()}
    return out, grads, report


def _whole(grad: torch.Tensor | None) -> torch.Tensor | None:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def case(folder: str, layout: dict[str, int]) -> list[str]:
    expected, expected_grads, _ = step(folder, layout, fused=False)
    out, grads, report = step(folder, layout, fused=True)
    wrong = []
    if not torch.allclose(out.loss, expected.loss, rtol=1e-5):
        wrong.append(f"loss {out.loss.item()} for {expected.loss.item()}")
    for name, grad in expected_grads.items():
        if (grad is None) != (grads[name] is None):
            wrong.append(f"{name} has a gradient in one of both")
        elif grad is not None and not torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-6):
            wrong.append(f"{name} is off by {(grads[name] - grad).abs().max():.1e}")
    return wrong + _untrue(report, isinstance(out.logits, Deferred))


def _untrue(report: InjectionReport, head_is_fused: bool) -> list[str]:
    (head,) = [row for row in report.rows if row.site == "lm_head"]
    wrong = [f"the report says {head}"] if head.swapped is not head_is_fused else []
    if report.coverage["swiglu"] != (2, 2):
        wrong.append(f"experts: {report}")
    return wrong


def worker(out: str) -> None:
    """What each process runs; the first writes what all found, with the weights beside it."""
    folder = str(Path(out).with_suffix(""))
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        tiny_model("qwen3_moe").save_pretrained(folder)
    dist.barrier()
    found = {}
    for name, layout in LAYOUTS.items():
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, case(folder, layout))
        found[name] = [line for of_rank in gathered for line in of_rank]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    leave_group()
