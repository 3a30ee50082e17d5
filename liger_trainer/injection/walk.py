"""Inject the kernels into a model, and remove them again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from liger_trainer.config import KernelConfig
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
from liger_trainer.injection.rules.proposal import OVERRIDDEN, Proposal, Search
from liger_trainer.report import InjectionReport, Row, Site, Status
from liger_trainer.swap import has_foreign_forward, is_swapped, swap, unswap

_ALWAYS, _EVERY = 8, 64  # a watch looks in the first 8 forwards, then in every 64th

logger = logging.getLogger(__name__)

_ACTIVATION_RULES = ("swiglu", "geglu")  # for a child of the module that is their site
_MODULE_RULES = ("rms_norm", "layer_norm", "rope", lora.RULE, "attention")
_RULES = (norm.propose, rotary.propose, lora.propose, attention.propose, masks.propose)


def inject(
    model: nn.Module,
    config: Mapping[str, bool] | KernelConfig | None = None,
    strict: bool = False,
) -> InjectionReport:
    """Swap every part of `model` for which a kernel is verified to be equal, in place.

    Only this instance changes, not other models of the same class. Parameters, their names and the
    model's forward stay as they are, and `restore` undoes the swaps. If the model was injected
    before, it is restored first.

    Args:
        model: a transformers model or any module built like one. It may be wrapped by PEFT, or be
            on the meta device; the report then states what would be swapped.
        config: switches as in `TrainingArguments.liger_kernel_config`; see `KernelConfig`.
        strict: raise ValueError for an eligible site that cannot be swapped.

    Returns the report of all sites that a rule applies to.

    Raises ValueError for an unknown key in `config`, and with `strict` for a refused site. After
    any exception the model is restored. The states of random number generators do not change.
    """
    config = KernelConfig.from_dict(config)
    restore(model)
    search = Search(_unwrapped(model), config)
    with _quiet(model):
        proposals = list(_proposals(search))
    report = InjectionReport(tuple(proposal.row for proposal in proposals))
    if strict and report.refused:
        refused = "; ".join(f"{row.site} ({row.rule}): {row.reason}" for row in report.refused[:5])
        raise ValueError(
            f"strict: {len(report.refused)} eligible sites cannot be swapped: {refused}. "
            "Pass strict=False to leave them as they are."
        )
    try:
        _swap(proposals, report)
        if is_injected(search.model):
            search.model._liger_watch = Watch(config, report, _ids(search.model))
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
    """Set up a block in which modules can be probed.

    The caller's autocast, grad mode, default device and random states have no effect in the block,
    and are the same afterwards.
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(probe.random_state_kept(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # only then: it slows every torch function
            stack.enter_context(torch.device("cpu"))
        for kind in {device.type for device in devices} - {"meta"} | {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _swap(proposals: list[Proposal], report: InjectionReport) -> None:
    done = set()
    for proposal in proposals:
        for module, mixin, key in proposal.swaps:
            # One module may appear at several sites, such as an activation that two MLPs share.
            if (id(module), mixin) not in done:
                done.add((id(module), mixin))
                swap(module, mixin, *key)
                module._liger_site = Site(report, proposal.row)


def restore(model: nn.Module) -> None:
    """Undo `inject`: the model computes bit for bit what it did before."""
    for module in model.modules():
        unswap(module)
        vars(module).pop("_liger_watch", None)


def is_injected(model: nn.Module) -> bool:
    """Return whether any module of `model` is swapped."""
    return any(map(is_swapped, model.modules()))


def injected_config(model: nn.Module) -> KernelConfig | None:
    """Return the switches that `model` was injected with; None if nothing is swapped in it."""
    watch = vars(_unwrapped(model)).get("_liger_watch")
    return None if watch is None else watch.config


def restore_for(model: nn.Module | None, trainer: object) -> None:
    """Restore a model that another trainer injected, for a trainer whose flag is off."""
    if model is not None and is_injected(model):
        restore(model)
        logger.warning(
            "use_liger_kernel is off for this %s: the kernels that were injected into its model "
            "before are taken out",
            type(trainer).__name__,
        )


def _proposals(search: Search) -> Iterator[Proposal]:
    fused = set()
    for site, module in search.model.named_modules():
        for proposal in _propose(search, site, module):
            if proposal.row.swapped:
                fused.add(proposal.row.rule)
            yield proposal
    yield from activation_memory.propose_for_model(search, fused)
    yield from head.propose_for_model(search)


def _propose(search: Search, site: str, module: nn.Module) -> Iterator[Proposal]:
    """Yield the proposals of all rules for `module` and for its activations."""
    found = (propose(search, site, module) for propose in _RULES)
    yield from _unless_overridden(search, filter(None, found))
    yield from _propose_for_activations(search, site, module)


def _propose_for_activations(search: Search, site: str, module: nn.Module) -> Iterator[Proposal]:
    return _unless_overridden(search, gated.propose(search, site, module))


def _unless_overridden(search: Search, proposals: Iterable[Proposal]) -> Iterator[Proposal]:
    for proposal in proposals:
        modules = (module for module, *_ in proposal.swaps if module is not search.model)
        if any(map(has_foreign_forward, modules)):
            yield Proposal.refused(proposal.row.site, proposal.row.rule, OVERRIDDEN)
        else:
            yield proposal


@dataclasses.dataclass(eq=False)
class Watch:
    """Detect modules that are added, replaced or removed after the injection, such as adapters."""

    config: KernelConfig
    report: InjectionReport
    ids: list[int] | None  # of the modules; None in a copy
    calls: int = 0

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "ids": None}

    def look(self, model: nn.Module) -> None:
        """Amend the report if modules have been added.

        Only the first forwards and then every 64th look for changes, because walking a model with
        adapters takes up to a millisecond.
        """
        self.calls += 1
        if self.calls > _ALWAYS and self.calls % _EVERY:
            return
        ids, known = _ids(model), self.ids
        if ids == known:
            return
        self.ids = ids
        if known is not None:
            self._amend(Search(model, self.config), set(known))

    def _amend(self, search: Search, known: set[int]) -> None:
        """Examine the modules whose ids are not `known`, and leave out rows of those that are
        gone."""
        modules = dict(search.model.named_modules())
        examined: dict[str, tuple[str, ...]] = {}  # for each site, by which rules
        proposals: list[Proposal] = []
        with _quiet(search.model):
            for site, module in modules.items():
                # What is swapped, as in a copy, is not examined: a rule would find its own work.
                if id(module) not in known and not is_swapped(module):
                    examined[site] = (*_MODULE_RULES, *_ACTIVATION_RULES)
                    proposals += _propose(search, site, module)
                elif any(id(child) not in known for child in module.children()):
                    examined[site] = _ACTIVATION_RULES
                    proposals += _propose_for_activations(search, site, module)
        rows = [row for row in map(_as_added, proposals) if row is not None and row.eligible]
        there = {(p.row.site, p.row.rule) for p in proposals}
        sites = (vars(module).get("_liger_site") for module in modules.values())
        there |= {(site.row.site, site.row.rule) for site in sites if site is not None}

        def is_gone(row: Row) -> bool:
            watched = row.rule in (*_MODULE_RULES, *_ACTIVATION_RULES)
            if not watched or (row.site, row.rule) in there:
                return False
            return row.site not in modules or row.rule in examined.get(row.site, ())

        self.report.remove(is_gone)
        self.report.amend(*rows)


def _as_added(proposal: Proposal) -> Row | None:
    """Return the report's row for a site that was added; None if its module runs fused."""
    if any(is_swapped(module) for module, *_ in proposal.swaps):
        return None
    if not proposal.row.swapped:
        return proposal.row
    reason = "added after the injection; call inject(model) again"
    return dataclasses.replace(proposal.row, status=Status.REFUSED, reason=reason)


def _ids(model: nn.Module) -> list[int]:
    """Return the ids of all modules, to tell whether the model still has the same ones."""
    modules = [model]
    for module in modules:
        modules.extend(child for child in module._modules.values() if child is not None)
    return list(map(id, modules))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, whose adapters are part of it."""
    inner: Callable | None = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
