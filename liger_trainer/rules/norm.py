"""RMSNorm and LayerNorm, in whatever form a model writes them.

A norm is a module without children that has a small float attribute (its epsilon) and at most a
weight and a bias, both one-dimensional. Which formula it is, is found by trying them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from liger_trainer import probe
from liger_trainer.kernels.layer_norm import layer_norm
from liger_trainer.kernels.rms_norm import rms_norm
from liger_trainer.report import Row
from liger_trainer.rules.finding import SWITCHED_OFF, Finding, Search, fingerprint
from liger_trainer.swap import Swapped

_WIDTH_IF_UNKNOWN = 64


@dataclasses.dataclass(frozen=True)
class NormForm:
    """One formula; `offset` and `cast_first` as in `kernels.rms_norm`."""

    centered: bool  # LayerNorm
    eps: float
    weight: str | None  # names of the parameters
    bias: str | None = None
    offset: float = 0.0
    cast_first: bool = True
    autocast_to_fp32: bool = False  # as autocast does with torch.nn.LayerNorm

    @property
    def rule(self) -> str:
        return "layer_norm" if self.centered else "rms_norm"

    def apply(self, x, weight, bias):
        if self.centered:
            return layer_norm(x, weight, bias, eps=self.eps)
        return rms_norm(x, weight, eps=self.eps, offset=self.offset, cast_first=self.cast_first)


class FusedNorm(Swapped):
    """forward(x) by the kernel of `_liger_key[0]`; with more than x (a gate, say) as before."""

    def forward(self, *args, **kwargs):
        if len(args) + len(kwargs) != 1:
            return self._liger_base.forward(self, *args, **kwargs)
        (hidden_states,) = (*args, *kwargs.values())
        form = self._liger_key[0]
        weight = None if form.weight is None else getattr(self, form.weight)
        bias = None if form.bias is None else getattr(self, form.bias)
        if form.autocast_to_fp32 and torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.float()
        return form.apply(hidden_states, weight, bias)


def examine(search: Search, site: str, module: nn.Module) -> Finding | None:
    if not _looks_like_norm(module):
        return None
    device = search.device_of(module)
    form, verdict = search.once(
        ("norm", fingerprint(module, device)), lambda: identify(module, device)
    )
    rule = form.rule if form else _nominal_rule(module)
    if form is None:
        return Finding(Row(site, rule, False, verdict.reason, verdict.max_error))
    if not getattr(search.config, rule):
        return Finding(Row(site, rule, False, SWITCHED_OFF, verdict.max_error, eligible=False))
    row = Row(site, rule, True, describe(form), verdict.max_error)
    return Finding(row, module, FusedNorm, (form,))


def describe(form: NormForm) -> str:
    if form.centered:
        parts = [name for name in (form.weight, form.bias) if name]
        return "LayerNorm" + (f" with {' and '.join(parts)}" if parts else " without parameters")
    if form.weight is None:
        return "RMSNorm without weight"
    weight = f"{form.offset:g} + weight" if form.offset else "weight"
    return f"RMSNorm, {weight} {'after' if form.cast_first else 'before'} the cast"


def _looks_like_norm(module: nn.Module) -> bool:
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return False
    parameters = list(module.parameters())
    return (
        bool(_epsilons(module))
        and len(parameters) <= 2
        and all(p.dim() in (1, 2) and p.shape == parameters[0].shape for p in parameters)
    )


def _epsilons(module: nn.Module) -> list[float]:
    values = (v for v in vars(module).values() if isinstance(v, float) and 0.0 < v < 0.1)
    return list(dict.fromkeys(values))


def _nominal_rule(module: nn.Module) -> str:
    return "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"


def _forms(module: nn.Module) -> Iterator[NormForm]:
    names = [name for name, _ in module.named_parameters()]
    bias = next((name for name in names if "bias" in name), None)
    weight = next((name for name in names if name != bias), None)
    for eps in _epsilons(module):
        if bias is None:
            yield NormForm(False, eps, weight, cast_first=True)
            if weight is not None:
                yield NormForm(False, eps, weight, cast_first=False)
                yield NormForm(False, eps, weight, cast_first=False, offset=1.0)
                yield NormForm(False, eps, weight, cast_first=True, offset=1.0)
        yield NormForm(True, eps, weight, bias)


def identify(module: nn.Module, device: torch.device) -> tuple[NormForm | None, probe.Verdict]:
    """The form that equals `module`, the one that also rounds like it if several do."""
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) != 1:
        inputs = ", ".join(p.name for p in required)
        return None, probe.Verdict(False, None, f"not a plain norm: forward takes ({inputs})")
    twin = probe.random_copy(module, device)
    original, parameters = probe.with_parameters(twin)
    width = _width(module)
    found, nearest = [], None
    for form in _forms(module):
        candidate = _candidate(form, [name for name, _ in twin.named_parameters()])
        verdict = probe.compare(original, candidate, _cases(width, parameters, device))
        if verdict.equal:
            found.append((form, verdict))
        elif nearest is None or (verdict.max_error or 9e9) < (nearest.max_error or 9e9):
            nearest = verdict
    if found:
        form, verdict = min(found, key=lambda pair: pair[1].rounding)
        upcast = _output_under_autocast(original, width, parameters, device) == torch.float32
        return dataclasses.replace(form, autocast_to_fp32=upcast), verdict
    reason = nearest.reason if nearest.max_error is None else "neither RMSNorm nor LayerNorm"
    return None, dataclasses.replace(nearest, reason=reason)


def _output_under_autocast(original, width, parameters, device: torch.device) -> torch.dtype:
    """The dtype that the original returns for a bf16 input and bf16 parameters."""
    case = next(c for c in _cases(width, parameters, device) if c.inputs[0].dtype == torch.bfloat16)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return original(*case.inputs).dtype


def _candidate(form: NormForm, names: list[str]):
    def candidate(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return form.apply(x, named.get(form.weight), named.get(form.bias))

    return candidate


def _width(module: nn.Module) -> int:
    for parameter in module.parameters():
        return parameter.shape[-1]
    shape = getattr(module, "normalized_shape", (_WIDTH_IF_UNKNOWN,))
    return shape[-1] if isinstance(shape, tuple) else _WIDTH_IF_UNKNOWN


def _cases(
    width: int, parameters: list[nn.Parameter], device: torch.device
) -> Iterator[probe.Case]:
    """fp32, bf16, and bf16 input with fp32 parameters (what autocast makes of a model)."""
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
    dtypes += [(torch.bfloat16, torch.float32)] if parameters else []
    for x_dtype, p_dtype in dtypes:
        for i, scale in enumerate(probe.SCALES):
            x = probe.draw((2, 3, width), scale, device, i)
            tensors = [x.to(x_dtype), *(p.detach().to(p_dtype) for p in parameters)]
            label = f"{x_dtype} input of size {scale:g}"
            mixed = x_dtype != p_dtype
            yield probe.Case(tuple(t.requires_grad_() for t in tensors), label, optional=mixed)
