"""Check whether a candidate computes the same function as the original.

Both run on random input, and on a random copy of the weights (at initialization they are 1 or 0,
which hides most mistakes), at several magnitudes (clamps and epsilons show only at the extremes),
forward and backward. In fp32 they must agree to rounding. In 16 bits the candidate must be about as
close to the original in fp32 as the original in 16 bits is. Every output must have the same dtype.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TypeVar

import torch
from torch import nn

from liger_trainer.kernels.runtime import every_size
from liger_trainer.swap import PLACED, has_foreign_forward

SCALES = (1e-3, 1.0, 100.0)
TOLERANCE_FP32 = 2e-5  # relative to the largest value; kernels sum rows in another order
FACTOR = 2.0  # how many times the original's rounding error is allowed
_GRADIENTS = 1000  # the first seed of `draw` for the gradients of outputs
Form = TypeVar("Form")  # identifies one of the formulas that a rule tries
_ON_CPU = {"device": "cpu", "dtype": torch.float32}  # independent of torch's defaults


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a candidate equals the original, and by how much they differ."""

    equal: bool
    max_error: float | None  # in fp32, relative to the largest value; None if not compared there
    reason: str
    rounding: float = 0.0  # largest 16-bit difference; decides between several equal candidates


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: the input tensors of both functions."""

    inputs: tuple[torch.Tensor, ...]
    label: str
    optional: bool = False  # skipped if the original does not take such inputs

    def cast(self, dtype: torch.dtype) -> Case:
        inputs = tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.inputs)
        return Case(inputs, self.label, self.optional)


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor: DeepSpeed's parameters are empty until gathered."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


_HOOKS = tuple(name for name, v in vars(nn.Module()).items() if "hooks" in name and v is not None)


def twin(
    module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor], memo: dict | None = None
) -> nn.Module:
    """Return a copy of `module` without hooks, with `make(tensor)` for parameters and buffers.

    A forward that accelerate's offloading put on the instance counts as a hook. The data of a
    parameter is not read, since it may be a shard or on the meta device; `make` gets the shape of
    the whole tensor from `whole_shape`.
    """
    memo = {} if memo is None else memo
    if id(module) not in memo:
        copied = memo[id(module)] = object.__new__(type(module))
        for child in module._modules.values():
            memo[id(child)] = child if child is None else twin(child, make, memo)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                made = make(tensor)
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if parameter else made
        # These are not copied like other attributes: an engine's dictionaries hold the module.
        for name in ("_modules", "_parameters", "_buffers"):
            values = vars(module)[name]
            memo[id(values)] = {k: v if v is None else memo[id(v)] for k, v in values.items()}
        memo.update({id(vars(module)[name]): type(vars(module)[name])() for name in _HOOKS})
        left_out = () if has_foreign_forward(module) else PLACED
        for name, value in vars(module).items():
            if name not in left_out:
                vars(copied)[name] = _copied(value, memo)
    return memo[id(module)]


def _copied(value: object, memo: dict) -> object:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # an engine's handle (a process group) has no copy
        return value


def random_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a twin of `module` on `device`, in fp32, with random parameters and equal buffers."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().to(device, torch.float32, copy=True)
        noise = torch.randn(whole_shape(tensor), generator=generator, **_ON_CPU)
        return (0.5 * noise + 0.25).to(device)

    return twin(module, make).requires_grad_()


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a twin of `module` on the meta device."""
    return twin(
        module, lambda t: torch.empty(whole_shape(t), dtype=t.dtype, device="meta")
    ).requires_grad_(False)


@contextlib.contextmanager
def random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the random states of the CPU and of `devices` after the block."""
    accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in accelerators:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        yield


def impurity(function: Callable, module: nn.Module, inputs: tuple) -> str | None:
    """Return a side effect of `function(*inputs)`, or None if none is found.

    It may draw random numbers, change `module`'s attributes, or return another result next time.
    """
    before, state = random_state(inputs[0].device), _state(module)
    results = []
    for training in (False, False, True):
        module.train(training)
        results.append(function(*inputs))
    module.eval()
    if not all(map(torch.equal, random_state(inputs[0].device), before)):
        return "draws random numbers"
    if not _same(_state(module), state):
        return "changes itself when it is called"
    if not torch.equal(*(r.detach().nan_to_num() for r in results[:2])):
        return "returns something else each time"
    return None


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators of the CPU and of `device`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _state(module: nn.Module) -> dict[str, tuple[object, int | None]]:
    return {
        name: (value, len(value) if isinstance(value, Sized) else None)
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_liger_")  # ours, of a swapped module
    }


def _same(state: dict, other: dict) -> bool:
    """Return whether two states hold the same objects; numbers and text are compared by value."""
    return state.keys() == other.keys() and all(
        (a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b))
        and length == other_length
        for (a, length), (b, other_length) in zip(state.values(), other.values(), strict=True)
    )


def draw(shape: tuple[int, ...], scale: float, device: torch.device, seed: int) -> torch.Tensor:
    """Return normal random numbers times `scale`, in fp32, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator, **_ON_CPU) * scale).to(device)


def compare(original: Callable, candidate: Callable, cases: Iterable[Case]) -> Verdict:
    """Compare both functions on each case, outputs and gradients.

    For 16-bit cases, the original in fp32 is the reference. `original(*inputs)` and
    `candidate(*inputs)` return a tensor or a tuple of tensors.
    """
    worst, rounding = None, 0.0
    for case in cases:
        try:
            expected = evaluate(original, case)
        except Exception as error:  # third-party modules may raise anything
            if case.optional:
                continue
            return Verdict(False, None, f"cannot be run on its own: {_first_line(error)}")
        try:
            with every_size():  # run the kernel even for small inputs
                got = evaluate(candidate, case)
        except ValueError as error:  # the kernel does not take such inputs
            return Verdict(False, None, _first_line(error))
        if len(expected) != len(got):
            outputs = len(expected) - sum(t.requires_grad for t in case.inputs)
            return Verdict(False, None, f"returns {outputs} tensors")
        for a, b in zip(expected, got, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return Verdict(False, worst, f"returns {a.dtype} {tuple(a.shape)} for {case.label}")
        if all(t.dtype == torch.float32 for t in case.inputs):
            error = max(map(relative_error, got, expected))
            worst = max(worst or 0.0, error)
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


def choose(
    original: Callable,
    candidates: Mapping[Form, Callable],
    cases: Callable[[], Iterable[Case]],
    otherwise: str,
    twin: nn.Module | None = None,
) -> tuple[Form | None, Verdict]:
    """Return the form whose candidate equals `original`; of several, the one that rounds like it.

    If `original` calls the module `twin`, which is in evaluation mode, they must also be equal in
    training mode. `otherwise` is the reason to give if all candidates differ.
    """
    verdicts = {form: compare(original, c, cases()) for form, c in candidates.items()}
    found = [(form, verdict) for form, verdict in verdicts.items() if verdict.equal]
    if not found:
        nearest = min(verdicts.values(), key=_distance)
        reason = nearest.reason if nearest.max_error is None else otherwise
        return None, dataclasses.replace(nearest, reason=reason)
    form, verdict = min(found, key=lambda pair: pair[1].rounding)
    if twin is not None:
        twin.train()
        in_training = compare(original, candidates[form], cases())
        twin.eval()
        if not in_training.equal:
            reason = f"{in_training.reason} in training mode"
            return None, dataclasses.replace(in_training, reason=reason)
    return form, verdict


def _distance(verdict: Verdict) -> float:
    return math.inf if verdict.max_error is None else verdict.max_error


def evaluate(function: Callable, case: Case) -> list[torch.Tensor]:
    """Return the outputs, followed by the gradient of each input that requires one."""
    outputs = function(*case.inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    wanted = [t for t in case.inputs if t.requires_grad]
    if not wanted:
        return [o.detach() for o in outputs]
    seeds = [_gradient(tuple(o.shape), o.dtype, o.device, i) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, wanted, seeds)
    return [t.detach() for t in (*outputs, *grads)]


@functools.lru_cache(maxsize=4)  # the original and a candidate get the same in each case
def _gradient(shape: tuple, dtype: torch.dtype, device: torch.device, i: int) -> torch.Tensor:
    """Return a random gradient for output `i`.

    These are not the numbers of an input: along itself, the gradient of a norm vanishes.
    """
    return draw(shape, 1.0, device, _GRADIENTS + i).to(dtype)


def relative_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error relative to the largest true value; inf if NaNs or infs differ."""
    a, truth = a.double(), truth.double()
    difference = (a - truth).abs().amax().item()
    if not math.isfinite(difference):  # neither are some of the values
        finite = torch.isfinite(truth)
        infinite = (t.masked_fill(finite, 0.0) for t in (a, truth))
        if not torch.allclose(*infinite, rtol=0.0, atol=0.0, equal_nan=True):
            return math.inf
        a, truth = (t.masked_fill(~finite, 0.0) for t in (a, truth))
        difference = (a - truth).abs().nan_to_num(math.inf).amax().item()
    return difference / max(truth.abs().amax().item(), 1e-30) if difference else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def with_parameters(module: nn.Module, states: int = 1) -> tuple[Callable, list[nn.Parameter]]:
    """Return `module` as a function of `states` inputs and its parameters, and the parameters.

    Parameters can then be probed like inputs.
    """
    names = [name for name, _ in module.named_parameters()]

    def run(*tensors):
        parameters = dict(zip(names, tensors[states:], strict=True))
        return torch.func.functional_call(module, parameters, tensors[:states])

    return run, list(module.parameters())
