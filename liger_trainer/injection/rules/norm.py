"""RMSNorm (also with a gate) and LayerNorm, in whatever form a model writes them.

A norm is a module without children that has a small float attribute (its epsilon), at most a weight
and a bias, both one-dimensional, and whose output does not depend on the scale of an input row. Its
formula is found by trying the known ones, in training and in evaluation mode.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from liger_trainer.injection import probe
from liger_trainer.injection.rules import gated_norm, norm_cases
from liger_trainer.injection.rules.gated_norm import FusedGatedNorm
from liger_trainer.injection.rules.proposal import (
    OVERRIDDEN,
    Proposal,
    Search,
    Swap,
    fingerprint,
)
from liger_trainer.kernels.layers.layer_norm import layer_norm
from liger_trainer.kernels.layers.rms_norm import rms_norm
from liger_trainer.kernels.runtime import all_plain, is_looked_into
from liger_trainer.swap import Proven, Swapped, has_foreign_forward, holds


@dataclasses.dataclass(frozen=True)
class NormForm:
    """One formula of a norm; `offset` and `cast_first` are as in `kernels.rms_norm`."""

    centered: bool  # LayerNorm
    eps: float
    weight: str | None  # name of the parameter, like `bias`
    bias: str | None = None
    offset: float = 0.0
    cast_first: bool = True
    autocast_to_fp32: bool = False  # as autocast does for torch.nn.LayerNorm
    ranks: tuple[int, ...] = ()  # ranks of inputs for which the formula was verified
    input: str = ""  # name of the input

    @property
    def rule(self) -> str:
        return "layer_norm" if self.centered else "rms_norm"

    def __str__(self) -> str:
        if self.centered:
            parts = [name for name in (self.weight, self.bias) if name]
            return "LayerNorm" + (
                f" with {' and '.join(parts)}" if parts else " without parameters"
            )
        if self.weight is None:
            return "RMSNorm without weight"
        weight = f"{self.offset:g} + weight" if self.offset else "weight"
        return f"RMSNorm, {weight} {'after' if self.cast_first else 'before'} the cast"

    def apply(self, x, weight, bias):
        if self.centered:
            return layer_norm(x, weight, bias, eps=self.eps)
        return rms_norm(x, weight, eps=self.eps, offset=self.offset, cast_first=self.cast_first)


class FusedNorm(Swapped):
    """A norm whose forward runs a kernel.

    Key: the form, and the state of the module for which it was verified. In another state, for
    inputs other than one tensor (a gate, say), and in compiled code, the norm's own forward runs.
    """

    def forward(self, *args, **kwargs):
        if is_looked_into():
            return super().forward(*args, **kwargs)
        form, proven = self._liger_key
        x = args[0] if args else kwargs.get(form.input)
        if len(args) + len(kwargs) != 1 or x is None or not holds(self, proven):
            return super().forward(*args, **kwargs)
        weight = None if form.weight is None else getattr(self, form.weight)
        bias = None if form.bias is None else getattr(self, form.bias)
        if not all_plain(x, weight, bias) or x.dim() not in form.ranks:
            return super().forward(*args, **kwargs)
        if form.autocast_to_fp32 and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        return form.apply(x, weight, bias)


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose a kernel for a module that is an RMSNorm, gated RMSNorm or LayerNorm."""
    if not _may_be_norm(module):
        return None
    if has_foreign_forward(module) and len(_required(type(module).forward)) == 2:  # self and input
        return Proposal.refused(site, _nominal_rule(module), OVERRIDDEN)
    device = search.device_of(module)
    key = fingerprint(module, device)
    form, verdict = search.cached(
        ("gated norm", key), lambda: gated_norm.identify(module, _epsilons(module), device)
    )
    if form is None and len(required_inputs(module)) == 1:
        form, verdict = search.cached(("norm", key), lambda: identify(module, device))
    if verdict is None:
        return None
    rule = form.rule if form else _nominal_rule(module)
    if form is None:
        return Proposal.refused(site, rule, verdict.reason, verdict.max_error)
    if not getattr(search.config, rule):
        return Proposal.off(site, rule, verdict.max_error)
    mixin = FusedNorm if isinstance(form, NormForm) else FusedGatedNorm
    swap = Swap(module, mixin, (form, Proven.of(module)))
    return Proposal.swapped(site, rule, str(form), swap, max_error=verdict.max_error)


def _may_be_norm(module: nn.Module) -> bool:
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return False
    shapes = {probe.whole_shape(p) for p in module.parameters()}
    fits = len(list(module.parameters())) <= 2 and len(shapes) <= 1
    return bool(_epsilons(module)) and fits and all(len(shape) in (1, 2) for shape in shapes)


def _epsilons(module: nn.Module) -> list[float]:
    values = (v for v in vars(module).values() if isinstance(v, float) and 0.0 < v < 0.1)
    return list(dict.fromkeys(values))


def _nominal_rule(module: nn.Module) -> str:
    """Return the rule under which to report that no formula fits, or that none could be tried."""
    return "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"


def _forms(module: nn.Module) -> Iterator[NormForm]:
    names: list[str | None] = [name for name, _ in module.named_parameters()]
    roles = itertools.permutations([*names, None, None][:2])  # either of two may be the bias
    for eps, (weight, bias) in itertools.product(_epsilons(module), dict.fromkeys(roles)):
        if bias is None:
            yield NormForm(False, eps, weight, cast_first=True)
            if weight is not None:
                yield NormForm(False, eps, weight, cast_first=False)
                yield NormForm(False, eps, weight, cast_first=False, offset=1.0)
                yield NormForm(False, eps, weight, cast_first=True, offset=1.0)
        yield NormForm(True, eps, weight, bias)


def identify(
    module: nn.Module, device: torch.device
) -> tuple[NormForm | None, probe.Verdict | None]:
    """Return the form that equals `module`; of several, the one that rounds like it.

    The verdict is None if the module is not a norm over the last dimension.
    """
    if len(required := required_inputs(module)) != 1:
        return None, None
    twin = probe.random_copy(module, device).eval()
    width = norm_cases.width_of(module)
    ranks = norm_cases.normalized_ranks(twin, width, device)
    if not ranks:
        return None, None
    original, parameters = probe.with_parameters(twin)
    cases = functools.partial(norm_cases.cases, width, ranks, parameters, device)
    if (reason := probe.impurity(original, twin, next(cases()).inputs)) is not None:
        return None, probe.Verdict(False, None, reason)
    names = [name for name, _ in twin.named_parameters()]
    candidates = {form: _candidate(form, names) for form in _forms(module)}
    otherwise = "neither RMSNorm nor LayerNorm"
    form, verdict = probe.choose(original, candidates, cases, otherwise, twin)
    if form is None:
        return None, verdict
    upcast = _output_under_autocast(original, cases()) == torch.float32
    proven = {"autocast_to_fp32": upcast, "ranks": ranks, "input": required[0]}
    return dataclasses.replace(form, **proven), verdict


def required_inputs(module: nn.Module) -> list[str]:
    """Return the names of forward's required arguments."""
    return _required(module.forward)


def _required(function: Callable) -> list[str]:
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _output_under_autocast(original, cases: Iterator[probe.Case]) -> torch.dtype:
    """Return the dtype of the original's output under autocast, for bf16 inputs and parameters."""
    case = next(c for c in cases if c.inputs[0].dtype == torch.bfloat16)
    with torch.no_grad(), torch.autocast(case.inputs[0].device.type, torch.bfloat16):
        return original(*case.inputs).dtype


def _candidate(form: NormForm, names: list[str]):
    def candidate(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return form.apply(x, named.get(form.weight), named.get(form.bias))

    return candidate
