"""Put the kernels into a model, and take them out again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from liger_trainer.config import KernelConfig
from liger_trainer.deferred.head_call import CallableHead
from liger_trainer.injection import probe
from liger_trainer.injection.rules import (
    activation_memory,
    attention,
    gated,
    head,
    lora,
    masks,
    norm,
    rotary,
)
from liger_trainer.injection.rules.finding import OVERRIDDEN, Finding, Search
from liger_trainer.report import InjectionReport
from liger_trainer.swap import is_swapped, swap, unswap

logger = logging.getLogger(__name__)

_RULES = (norm.examine, rotary.examine, lora.examine, attention.examine, masks.examine)


def inject(
    model: nn.Module,
    config: Mapping[str, bool] | KernelConfig | None = None,
    strict: bool = False,
) -> InjectionReport:
    """Swaps every part of `model` that a kernel provably computes, in place and reversibly.

    Only this instance changes: other models, also of the same class, are not touched. Parameters,
    their names and the model's forward stay. A model that was injected before starts from its plain
    state again.

    Args:
        model: a model of transformers or any module built like one; may be wrapped by PEFT, and may
            lie on the meta device (then the report says what would be swapped).
        config: switches as in `TrainingArguments.liger_kernel_config`; see `KernelConfig`.
        strict: raise instead of leaving an eligible site as it is.

    Returns the report of every site that was looked at.

    Raises ValueError for an unknown key in `config`, and with `strict` for a refused site. Whatever
    is raised, the model is then plain. The state of random number generators is left as it was.
    """
    config = KernelConfig.from_dict(config)
    restore(model)
    search = Search(_unwrapped(model), config)
    with _quiet(model):
        findings = list(_find(search))
    report = InjectionReport(tuple(f.row for f in findings if f.row.rule != "model"))
    if strict and report.refused:
        refused = "; ".join(f"{row.site} ({row.rule}): {row.reason}" for row in report.refused[:5])
        raise ValueError(
            f"strict: {len(report.refused)} eligible sites cannot be swapped: {refused}. "
            "Pass strict=False to leave them as they are."
        )
    try:
        _swap(findings)
    except BaseException:
        restore(model)
        raise
    logger.info("kernels %s\n%s", config, report)
    if report.refused:
        logger.warning(
            "%d of %d eligible sites were not swapped; print the injection report for the reasons",
            len(report.refused),
            sum(coverage.eligible for coverage in report.coverage.values()),
        )
    return report


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Within it, modules may be probed; nothing that the caller has set plays in or is changed."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(probe.random_state_kept(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # every function is slower below
            stack.enter_context(torch.device("cpu"))
        for kind in {device.type for device in devices} - {"meta"} | {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _swap(findings: list[Finding]) -> None:
    done = set()
    for finding in findings:
        # One object may be found at several places: an activation that two MLPs share.
        if finding.row.swapped and (claim := (id(finding.module), finding.mixin)) not in done:
            done.add(claim)
            swap(finding.module, finding.mixin, *finding.key)


def restore(model: nn.Module) -> None:
    """Undoes `inject`: the model computes bit for bit what it did before."""
    for module in model.modules():
        unswap(module)


def is_injected(model: nn.Module) -> bool:
    return any(map(is_swapped, model.modules()))


def _find(search: Search) -> Iterator[Finding]:
    for finding in _examine(search):
        overridden = finding.row.swapped and "forward" in vars(finding.module)
        overridden = overridden and not issubclass(finding.mixin, CallableHead)  # proven there
        if overridden and finding.module is not search.model:
            yield Finding(dataclasses.replace(finding.row, swapped=False, reason=OVERRIDDEN))
        else:
            yield finding


def _examine(search: Search) -> Iterator[Finding]:
    names = {id(m): name for name, m in search.model.named_modules()}
    swapped = set()
    for module in search.model.modules():
        for examine in _RULES:
            finding = examine(search, names[id(module)], module)
            if finding is not None:
                if finding.row.swapped:
                    swapped.add(finding.row.rule)
                yield finding
        for finding in gated.examine(search, names[id(module)], module):
            if finding.row.swapped:
                swapped.add(finding.row.rule)
            yield finding
    yield from activation_memory.examine_model(search, swapped)
    yield from head.examine_model(search)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose adapters are part of it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
