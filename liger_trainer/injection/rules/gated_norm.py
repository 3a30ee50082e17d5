"""RMSNorm with a gate, a forward of two tensors; its formula is found by trying the known ones."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from liger_trainer.injection import probe
from liger_trainer.injection.rules import norm_cases
from liger_trainer.kernels.layers.gated_rms_norm import MIN_ELEMENTS, gated_rms_norm
from liger_trainer.kernels.runtime import all_plain, is_looked_into, pays
from liger_trainer.swap import Swapped, holds, own_attributes


@dataclasses.dataclass(frozen=True)
class GatedNormForm:
    """One formula of a gated norm; the options are those of `kernels.gated_rms_norm`."""

    eps: float
    weight: str  # name of the parameter
    group_size: int | None
    gate_first: bool
    cast_first: bool
    activation: str
    ranks: tuple[int, ...] = ()  # ranks of inputs for which the formula was verified
    inputs: tuple[str, str] = ("", "")  # names of x and gate

    rule = "rms_norm"

    def apply(self, x, gate, weight):
        return gated_rms_norm(
            x,
            gate,
            weight,
            eps=self.eps,
            group_size=self.group_size,
            gate_first=self.gate_first,
            cast_first=self.cast_first,
            activation=self.activation,
        )

    def __str__(self) -> str:
        gate = f"{self.activation}(gate) {'before' if self.gate_first else 'after'} it"
        groups = f", groups of {self.group_size}" if self.group_size else ""
        cast = "after" if self.cast_first else "before"
        return f"RMSNorm, {gate}{groups}, weight {cast} the cast"


class FusedGatedNorm(Swapped):
    """A gated norm that runs a kernel if that is faster; key as in `FusedNorm`."""

    def forward(self, *args, **kwargs):
        if is_looked_into():
            return super().forward(*args, **kwargs)
        form, proven = self._liger_key
        given = {**dict(zip(form.inputs, args, strict=False)), **kwargs}
        x, gate = map(given.get, form.inputs)
        if len(args) + len(kwargs) != 2 or x is None or gate is None or not holds(self, proven):
            return super().forward(*args, **kwargs)
        weight = getattr(self, form.weight)
        if (
            weight is None
            or not all_plain(x, gate, weight)
            or not pays(x, MIN_ELEMENTS)
            or x.dim() not in form.ranks
            or (gate.shape, gate.dtype) != (x.shape, x.dtype)
        ):
            return super().forward(*args, **kwargs)
        return form.apply(x, gate, weight)


def inputs_of(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of the two tensors that forward takes; None if it takes other inputs."""
    parameters = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if len(parameters) < 2 or any(p.default is p.empty for p in parameters[2:]):
        return None
    return parameters[0].name, parameters[1].name


def identify(
    module: nn.Module, eps: list[float], device: torch.device
) -> tuple[GatedNormForm | None, probe.Verdict | None]:
    """Return the form that equals `module`; of several, the one that rounds like it.

    The verdict is None if the module is not a gated norm.
    """
    inputs = inputs_of(module)
    names = [name for name, _ in module.named_parameters()]
    if inputs is None or len(names) != 1:
        return None, None
    width = norm_cases.width_of(module)
    twin = probe.random_copy(module, device).eval()

    def with_gate(x):
        return twin(x, probe.draw(tuple(x.shape), 1.0, device, 9))

    ranks = norm_cases.normalized_ranks(with_gate, width, device)
    if not ranks:
        return None, None
    original, parameters = probe.with_parameters(twin, states=2)
    cases = functools.partial(norm_cases.cases, width, ranks, parameters, device, states=2)
    if (reason := probe.impurity(original, twin, next(cases()).inputs)) is not None:
        return None, probe.Verdict(False, None, reason)
    candidates = {form: form.apply for form in _forms(module, eps, names[0], width)}
    otherwise = "no known form of RMSNorm with a gate"
    form, verdict = probe.choose(original, candidates, cases, otherwise, twin)
    if form is None:
        return None, verdict
    return dataclasses.replace(form, ranks=ranks, inputs=inputs), verdict


def _forms(module, eps: list[float], weight: str, width: int) -> Iterator[GatedNormForm]:
    numbers = [v for _, v in own_attributes(module) if type(v) is int and 0 < v < width]
    divisors = [v for v in numbers if width % v == 0]
    sizes = dict.fromkeys([None, *divisors, *(width // v for v in divisors if v > 1)])
    options = itertools.product(eps, sizes, (False, True), (True, False), ("silu", "sigmoid"))
    for each, size, gate_first, cast_first, activation in options:
        yield GatedNormForm(each, weight, size, gate_first, cast_first, activation)
