"""One oracle for every kernel: fp64 is truth, same-dtype torch sets the tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch


def run(fn: Callable, tensors: dict[str, torch.Tensor], seeds: list[torch.Tensor] | None = None):
    """Outputs of `fn(**tensors)` and the gradient of each floating tensor, given output gradients.

    Returns (outputs, gradients by name, output gradients used).
    """
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }
    outputs = fn(**leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if seeds is None:
        seeds = [torch.randn_like(o) for o in outputs]
    torch.autograd.backward(outputs, [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)])
    grads = {name: t.grad for name, t in leaves.items() if t.is_floating_point()}
    return [o.detach() for o in outputs], grads, seeds


def assert_close_to_truth(name, got, same_dtype, truth, *, factor=2.0, input_eps=0.0) -> None:
    """`got` is as near to `truth` (fp64) as same-dtype torch is, times `factor`, plus one rounding.

    A single number may be near by luck in one and not in the other: it is also allowed a quarter of
    `input_eps`, the rounding of the inputs' dtype.
    """
    _assert_close(name, got, [(same_dtype, truth)], factor, input_eps)


def _assert_close(name, got, of_torch, factor, input_eps=0.0, size=0.0) -> None:
    """`of_torch` holds pairs of same-dtype torch and fp64; the first pair is of `got`'s inputs."""
    same_dtype, truth = of_torch[0]
    assert got is not None, f"{name}: no value"
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, torch gives {same_dtype.dtype}"
    assert got.shape == same_dtype.shape, f"{name}: {got.shape}, torch gives {same_dtype.shape}"
    finite = torch.isfinite(truth) & torch.isfinite(same_dtype)
    assert torch.isfinite(got[finite]).all(), f"{name}: not finite"
    if not finite.any():
        return
    eps = torch.finfo(same_dtype.dtype).eps
    if same_dtype.dtype == torch.float32:
        eps *= 4  # exp and division on a GPU are good to two or three units in the last place
    if truth.numel() == 1:
        eps = max(eps, input_eps / 4)
    for kind, norm in [("L2", lambda t: t.norm()), ("max", lambda t: t.abs().max())]:
        error = norm(got.double()[finite] - truth[finite])
        usual = max(norm(_finite(same.double() - exact)) for same, exact in of_torch)
        # fp64 has its own rounding, such as that of 1 + tanh(x) for x < -19.
        own = 8 * torch.finfo(torch.float64).eps + size * torch.finfo(same_dtype.dtype).eps
        allowed = factor * usual + eps * norm(truth[finite]) + own
        assert error <= allowed, f"{name}: {kind} error {error:.3e} > allowed {allowed:.3e}"


def _finite(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t.isfinite(), t, 0.0)


def assert_matches(
    candidate: Callable,
    reference: Callable,
    tensors: dict[str, torch.Tensor],
    *,
    factor: float = 2.0,
    size: float = 0.0,
) -> None:
    """Outputs and every gradient of `candidate` match `reference` evaluated in fp64.

    Both are called as fn(**tensors); `reference` must be written in differentiable torch that is
    valid in any dtype. The tolerance is `factor` times the error of `reference` in the tensors' own
    dtype, plus one rounding of that dtype. Of a few numbers that error may be small by luck, above
    all where terms cancel: these may have twice the largest error among inputs a few roundings
    away. If results are differences of numbers of about `size`, one rounding of these is allowed.
    """
    of_these, seeds = _of_reference(reference, tensors)
    pairs = [of_these]
    got, _ = _named(candidate, tensors, seeds)
    assert got.keys() == pairs[0].keys()
    for name, value in got.items():
        try:
            _assert_close(name, value, [pairs[0][name]], factor, size=size)
        except AssertionError:
            if value is None or value.numel() > _FEW:
                raise
            if len(pairs) == 1:
                generator = torch.Generator().manual_seed(0)
                near = [_nearby(tensors, generator) for _ in range(_NEIGHBORS)]
                pairs += [_of_reference(reference, each, seeds)[0] for each in near]
            _assert_close(name, value, [each[name] for each in pairs], 2 * factor, size=size)


_NEIGHBORS, _FEW = 16, 64


def _named(fn: Callable, tensors: dict[str, torch.Tensor], seeds=None):
    outputs, gradients, seeds = run(fn, tensors, seeds)
    named = {f"output {i}": output for i, output in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in gradients.items()}, seeds


def _of_reference(reference, tensors, seeds=None):
    """Return each output and gradient in the tensors' dtype and in fp64, and the seeds used."""
    same, seeds = _named(reference, tensors, seeds)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    truth, _ = _named(reference, wide, [seed.double() for seed in seeds])
    return {name: (same[name], truth[name]) for name in truth}, seeds


def _nearby(tensors: dict[str, torch.Tensor], generator: torch.Generator):
    """Return tensors whose elements are up to four roundings away from those of `tensors`."""
    near = {}
    for name, t in tensors.items():
        near[name] = t
        if t.is_floating_point():
            roundings = torch.randint(-4, 5, t.shape, generator=generator).to(t.device)
            near[name] = (t.double() * (1 + roundings * torch.finfo(t.dtype).eps)).to(t.dtype)
    return near
