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
    assert got is not None, f"{name}: no value"
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, torch gives {same_dtype.dtype}"
    assert got.shape == same_dtype.shape, f"{name}: {got.shape}, torch gives {same_dtype.shape}"
    got64, torch64, truth = got.double(), same_dtype.double(), truth.double()
    assert torch.isfinite(got64).all() or not torch.isfinite(truth).all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    if got.dtype == torch.float32:
        eps *= 4  # exp and division on a GPU are good to two or three units in the last place
    if truth.numel() == 1:
        eps = max(eps, input_eps / 4)
    for kind, norm in [("L2", lambda t: t.norm()), ("max", lambda t: t.abs().max())]:
        error, allowed = norm(got64 - truth), factor * norm(torch64 - truth) + eps * norm(truth)
        allowed = allowed + torch.finfo(got.dtype).tiny
        assert error <= allowed, f"{name}: {kind} error {error:.3e} > allowed {allowed:.3e}"


def assert_matches(
    candidate: Callable,
    reference: Callable,
    tensors: dict[str, torch.Tensor],
    *,
    factor: float = 2.0,
) -> None:
    """Outputs and every gradient of `candidate` match `reference` evaluated in fp64.

    Both are called as fn(**tensors); `reference` must be written in differentiable torch that is
    valid in any dtype. The tolerance is `factor` times the error of `reference` in the tensors' own
    dtype, plus one rounding of that dtype.
    """
    tensors64 = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    same, same_grads, seeds = run(reference, tensors)
    truth, truth_grads, _ = run(reference, tensors64, [s.double() for s in seeds])
    got, got_grads, _ = run(candidate, tensors, seeds)
    assert len(got) == len(truth)
    input_eps = max(torch.finfo(t.dtype).eps for t in tensors.values() if t.is_floating_point())
    for i, (g, s, t) in enumerate(zip(got, same, truth, strict=True)):
        assert_close_to_truth(f"output {i}", g, s, t, factor=factor, input_eps=input_eps)
    for name, truth_grad in truth_grads.items():
        assert_close_to_truth(
            f"gradient of {name}", got_grads[name], same_grads[name], truth_grad, factor=factor
        )
