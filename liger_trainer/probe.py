"""Does a candidate compute the same function as the original?

Both run on random input, and on a random copy of the weights (at initialisation they are 1 or 0,
which hides most mistakes), at several magnitudes (clamps and epsilons show only at the extremes),
forward and backward. In fp32 they must agree to rounding. In 16 bits the candidate must be as near
to the original in fp32 as the original in 16 bits is; and every output must have the same dtype.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn

from liger_trainer.kernels.runtime import every_size

SCALES = (1e-3, 1.0, 100.0)
TOLERANCE_FP32 = 2e-5  # relative to the largest value; sums over a row in another order
FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    equal: bool
    max_error: float | None  # fp32, relative to the largest value
    reason: str
    rounding: float = 0.0  # largest 16-bit difference between the two: chooses among equals


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: the tensors both functions get, all requiring gradients or none."""

    inputs: tuple[torch.Tensor, ...]
    label: str
    optional: bool = False  # leave it out if the original does not take such inputs

    def cast(self, dtype: torch.dtype) -> Case:
        inputs = tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.inputs)
        return Case(inputs, self.label, self.optional)


def random_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `module` on `device` in fp32 with random parameters; works from the meta device."""
    twin = copy.deepcopy(module)
    if any(p.is_meta for p in twin.parameters()):
        twin = twin.to_empty(device=device)
    twin = twin.to(device=device, dtype=torch.float32)
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * noise + 0.25)
            parameter.requires_grad_()
    return twin


def draw(shape: tuple[int, ...], scale: float, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device)


def compare(original: Callable, candidate: Callable, cases: Iterator[Case]) -> Verdict:
    """Runs both on each case. A case in 16 bits is also run, by the original, in fp32.

    `original(*inputs)` and `candidate(*inputs)` return a tensor or a tuple of tensors.
    """
    worst, rounding = 0.0, 0.0
    for case in cases:
        try:
            expected = evaluate(original, case)
        except Exception as error:  # whatever a stranger's module raises: it cannot be probed
            if case.optional:
                continue
            return Verdict(False, None, f"cannot be run on its own: {_first_line(error)}")
        try:
            with every_size():  # the kernel itself is on trial, whatever the size
                got = evaluate(candidate, case)
        except ValueError as error:  # the kernel does not take such input
            return Verdict(False, None, _first_line(error))
        for a, b in zip(expected, got, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return Verdict(False, worst, f"returns {a.dtype} {tuple(a.shape)} for {case.label}")
        if all(t.dtype == torch.float32 for t in case.inputs):
            error = max(map(relative_error, got, expected))
            worst = max(worst, error)
            if not error <= TOLERANCE_FP32:
                return Verdict(False, worst, f"differs by {error:.1e} for {case.label}")
        else:
            truth = evaluate(original, case.cast(torch.float32))
            for a, b, t in zip(expected, got, truth, strict=True):
                allowed = FACTOR * relative_error(a, t) + torch.finfo(torch.bfloat16).eps / 2
                if not (error := relative_error(b, t)) <= allowed:
                    return Verdict(False, worst, f"rounds worse ({error:.1e}) for {case.label}")
                rounding = max(rounding, relative_error(b, a))
    return Verdict(True, worst, "equal", rounding)


def evaluate(function: Callable, case: Case) -> list[torch.Tensor]:
    """Outputs, then the gradient of each input that requires one."""
    outputs = function(*case.inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    wanted = [t for t in case.inputs if t.requires_grad]
    if not wanted:
        return [o.detach() for o in outputs]
    seeds = [draw(tuple(o.shape), 1.0, o.device, i).to(o.dtype) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, wanted, seeds)
    return [t.detach() for t in (*outputs, *grads)]


def relative_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    a, truth = a.double(), truth.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(truth)):
        return float("inf")
    difference = (a - truth).nan_to_num().abs().amax().item()
    return difference / max(truth.nan_to_num().abs().amax().item(), 1e-30) if difference else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def with_parameters(module: nn.Module) -> tuple[Callable, list[nn.Parameter]]:
    """`module` as a function of (input, *parameters), so that parameters are probed like inputs."""
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return run, list(module.parameters())
