"""SwiGLU and GeGLU: an activation whose result is multiplied by another projection.

The activation module is swapped, not the MLP around it: it returns a deferred activation, and the
multiplication of that by a tensor of the same shape runs the fused kernel. So every way of writing
a gated MLP works, dense, packed or as experts, and none has to be recognized. Any other use of the
result computes the activation as before.

Small inputs and compiled code use the activation itself: there the fusion does not pay, or the
compiler does it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer.deferred import Attach, Deferred
from liger_trainer.hooks import foreign_hooks, has_backward_hooks
from liger_trainer.injection import probe
from liger_trainer.injection.rules.gating import PRODUCTS, is_gated
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap, fingerprint
from liger_trainer.kernels.layers.glu import MIN_ELEMENTS, geglu, swiglu
from liger_trainer.kernels.recompute import without_hooks
from liger_trainer.kernels.runtime import PLAIN, is_looked_into, pays
from liger_trainer.report import Status
from liger_trainer.swap import Proven, Swapped, holds, note


@dataclasses.dataclass(frozen=True)
class Gate:
    """An activation function and the kernel for its product."""

    rule: str
    approximate: str | None = None  # of gelu

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) if self.rule == "swiglu" else F.gelu(x, approximate=self.approximate)

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.rule == "swiglu":
            return swiglu(gate, up)
        return geglu(gate, up, approximate=self.approximate)


_GATES = (Gate("swiglu"), Gate("geglu", "tanh"), Gate("geglu", "none"))


_CHANGED = (
    "The input of a deferred activation was changed in place before its result was used. "
    "Switch it off: liger_kernel_config={'swiglu': False, 'geglu': False}"
)


class DeferredActivation(Deferred):
    """activation(gate), computed on any use other than a multiplication."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _gate: torch.Tensor
    _gate_version: int
    _form: Gate
    _owner: FusedActivation

    @property
    def gate(self) -> torch.Tensor:
        """The activation's input, as it was when the activation was called."""
        if self._gate._version != self._gate_version:
            raise RuntimeError(_CHANGED)
        return self._gate

    def __mul__(self, other):
        # `handlers` would find the product as well, but only after 8 us in torch's dispatch.
        product = _multiply(self, other)
        return super().__mul__(other) if product is NotImplemented else product

    __rmul__ = __mul__  # torch's multiplication commutes, bit for bit

    def compute(self) -> torch.Tensor:
        _note_use(self._owner)
        # The class's own forward saves what it saves where nothing is deferred: a checkpointed
        # layer, which is run again in backward, must save the same tensors then.
        return type(self._owner).forward(self._owner, self.gate)


def _multiply(a, b, **kwargs):
    activation, up = (a, b) if isinstance(a, DeferredActivation) else (b, a)
    # A value that exists may have been changed in place.
    if kwargs or type(up) not in PLAIN or activation._value is not None:
        return NotImplemented
    gate = activation.gate  # has the activation's shape, dtype and device, and is faster to read
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        return NotImplemented
    if not activation._owner._liger_multiplied:
        activation._owner._liger_multiplied = True
    return activation._form.product(gate, up)


def _note_use(owner: FusedActivation) -> None:
    """Record that what `owner` returned is used in another way than in a product."""
    is_known = owner._liger_key[2]
    if owner._liger_multiplied:  # elsewhere
        note(owner, "its result is not only multiplied with another projection")
    elif is_known:
        note(owner, "its result is not multiplied with a projection of its shape")
    else:
        note(owner, _no_gate(owner), Status.NOT_APPLICABLE)
    if not owner._liger_multiplied:
        owner._liger_unfused = True  # do not defer again


def _no_gate(activation: nn.Module) -> str:
    return f"{type(activation).__name__} has no gate"


def _register_hook(activation, hook):
    return activation.materialize().register_hook(hook)  # a fused product would not call the hook


def _retain_grad(activation):
    return activation.materialize().retain_grad()


DeferredActivation.handlers |= dict.fromkeys(PRODUCTS, _multiply)
DeferredActivation.handlers |= {
    torch.Tensor.register_hook: _register_hook,
    torch.Tensor.retain_grad: _retain_grad,
}


class FusedActivation(Swapped):
    """An activation whose call returns a deferred activation if a fused product would be faster.

    The call is replaced, not the forward inside it: an engine's hooks, which gather and free
    parameters, have nothing to do for a module without parameters, and would use its result. If
    there are such hooks, inputs of every size are deferred, because processes whose rows have
    different lengths must call the same modules in the same order.

    Key: the gate, the state of the module for which it was verified, and whether the module around
    it is known to multiply its result. Without gradients nothing is deferred, because the caller
    may then change x in place.
    """

    _liger_multiplied = False
    _liger_unfused = False

    def __call__(self, *args, **kwargs):
        x = args[0] if len(args) == 1 and not kwargs else None
        if type(x) in PLAIN and not is_looked_into():
            hooked = vars(self)["_forward_pre_hooks"]
            if (hooked or pays(x, MIN_ELEMENTS)) and self._liger_may_defer(x):
                return defer_activation(self, x)
        return super().__call__(*args, **kwargs)

    def _liger_may_defer(self, x: torch.Tensor) -> bool:
        hooked = has_backward_hooks(self) or foreign_hooks(self)
        recorded = torch.is_grad_enabled() and x.requires_grad and not torch.is_inference(x)
        if hooked:
            note(self, "a hook was put on it after the injection")
        return recorded and not (hooked or self._liger_unfused) and holds(self, self._liger_key[1])


def defer_activation(owner: FusedActivation, x: torch.Tensor) -> DeferredActivation:
    """Return the deferred activation of `x`, computed as `owner`, a swapped module, would."""
    form = owner._liger_key[0]

    def make():
        deferred = DeferredActivation(x.shape, x.dtype, x.device)
        deferred._gate, deferred._gate_version = x, version
        deferred._form, deferred._owner = form, owner
        return deferred

    def recompute(gate: torch.Tensor) -> torch.Tensor:
        if gate._version != version:
            raise RuntimeError(_CHANGED)
        return form.activation(gate)

    version = x._version
    # Hooks of checkpointing count what is saved, and nothing is where the module itself runs.
    with without_hooks():
        return Attach.apply(make, recompute, x)


def propose(search: Search, site: str, module: nn.Module) -> Iterator[Proposal]:
    """Propose a swap for each child of `module` that is an activation."""
    for name, child in module.named_children():
        tensors = (*child.parameters(), *child.buffers())
        if not tensors and next(child.children(), None) is None:
            yield from _propose_for_child(search, site, module, name, child)


def _propose_for_child(search, site, module, name, child) -> Iterator[Proposal]:
    device = search.device_of(module)
    key = fingerprint(child, device)
    gate, verdict = search.cached(("gate", key), lambda: identify(child, device))
    if gate is None and not search.cached(("activation", key), lambda: _is_activation(child)):
        return
    rule = gate.rule if gate else "swiglu"
    key = "gated", fingerprint(module, device), name
    gated = search.cached(key, lambda: is_gated(module, name))
    if gated is False:
        yield Proposal.not_applicable(site, rule, _no_gate(child))
    elif gate is None:
        reason = f"{type(child).__name__} {verdict.reason}"
        why_not = Proposal.refused if gated else Proposal.not_applicable
        yield why_not(site, rule, reason)
    elif not getattr(search.config, rule):
        yield Proposal.off(site, rule, verdict.max_error)
    else:
        swap = Swap(child, FusedActivation, (gate, Proven.of(child), gated is True))
        reason = f"{name} times its gate" + ("" if gated else ", if it has one")
        yield Proposal.swapped(site, rule, reason, swap, max_error=verdict.max_error)


def _is_activation(child: nn.Module) -> bool:
    """Return whether `child` applies one nonlinear function to every element.

    The report then states why it is not fused. Dropout in evaluation mode is no activation.
    """
    x = probe.draw((3, 4, 8), 1.0, torch.device("cpu"), 0)
    other = x.clone()
    other[0, 0, 0] += 1.0
    try:
        with torch.no_grad():
            twin = probe.random_copy(child, x.device).eval()
            y, beside, doubled, negated = map(twin, (x, other, 2 * x, -x))
            is_line = torch.allclose(doubled, 2 * y) and torch.allclose(negated, -y)
            same = y.shape == x.shape and torch.equal(y.flatten()[1:], beside.flatten()[1:])
            return same and not is_line
    except Exception:  # third-party modules may raise anything
        return False


def identify(child: nn.Module, device: torch.device) -> tuple[Gate | None, probe.Verdict]:
    """Return the gate whose product equals `child(gate) * up`."""

    def original(x, up):
        return twin(x) * up

    try:
        twin = probe.random_copy(child, device).eval()
        reason = probe.impurity(original, twin, next(_cases(device)).inputs)
    except Exception:  # it cannot be copied, or does not take a single tensor
        reason = _NEITHER
    if reason is not None:
        return None, probe.Verdict(False, None, reason)
    candidates = {gate: gate.product for gate in _GATES}
    cases = functools.partial(_cases, device)
    return probe.choose(original, candidates, cases, _NEITHER, twin)


_NEITHER = "is neither SiLU nor GELU"


def _cases(device: torch.device) -> Iterator[probe.Case]:
    shapes = {1.0: (4, 33), 1e-3: (2, 3, 65), 100.0: (1, 3000)}
    for dtype in (torch.float32, torch.bfloat16):
        for scale, shape in shapes.items():
            yield _case(f"{dtype} input {shape} of size {scale:g}", shape, scale, device, dtype)
    yield _case("one row", (17,), 1.0, device)
    yield _case("a NaN", (4, 33), 1.0, device, first=float("nan"))


def _case(label, shape, scale, device, dtype=torch.float32, first=None) -> probe.Case:
    gate, up = (probe.draw(shape, scale, device, i).to(dtype) for i in range(2))
    if first is not None:
        gate[0, 0] = first
    return probe.Case((gate.requires_grad_(), up.requires_grad_()), label)
