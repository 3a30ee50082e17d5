"""DDP with a hook on the output head, on two CPU processes, against one process without DDP.

The hook is put there after the injection, before or after the model is wrapped. Writes what is
wrong in each case, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import engines
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from liger_trainer import inject
from liger_trainer.runs.engine import leave_group


def case(name: str, find_unused: bool, hook_first: bool) -> list[str]:
    rank = dist.get_rank()
    loss_of = engines.LOSSES[name]
    expected_losses, expected = engines.on_one_process(
        loss_of, False, "full", dist.get_world_size()
    )
    model = engines.tiny(False, "full")
    report = inject(model)
    seen: list[torch.Size] = []

    def hook(module, args, out):
        seen.append(out.shape)

    if hook_first:
        model.lm_head.register_forward_hook(hook)
    engine = DistributedDataParallel(model, find_unused_parameters=find_unused)
    if not hook_first:
        model.lm_head.register_forward_hook(hook)
    losses = engines.train(engine, loss_of, rank)
    got = engines.whole_weights(engine, model)
    mine = expected_losses[2 * rank : 2 * rank + 2]
    wrong = []
    if max(abs(a - b) for a, b in zip(losses, mine, strict=True)) > engines.TOLERANCE:
        wrong.append(f"losses {losses} for {mine}")
    for key, value in expected.items():
        if not torch.allclose(got[key], value, rtol=1e-4, atol=1e-6):
            wrong.append(f"{key} is off by {(got[key] - value).abs().max():.1e}")
    if seen != [(engines.MICRO, engines.LENGTH, engines.VOCAB)] * 2:
        wrong.append(f"the hook saw {seen}")
    (row,) = [row for row in report.rows if row.site == "lm_head"]
    if row.swapped or "hooks" not in row.reason:
        wrong.append(f"the report says {row}")
    return wrong


def worker(out: str) -> None:
    """What each process runs; the first writes what all found."""
    dist.init_process_group("gloo")
    found = {}
    for name in engines.LOSSES:
        for find_unused in (False, True):
            for hook_first in (False, True):
                wrong = case(name, find_unused, hook_first)
                gathered: list = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, wrong)
                found[f"{name}, {find_unused=}, {hook_first=}"] = [
                    w for of_rank in gathered for w in of_rank
                ]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    leave_group()
