"""SwiGLU and GeGLU: an activation whose result is multiplied with another projection.

The activation module is swapped, not the MLP around it: it returns a deferred activation, and the
multiplication of that with anything of its shape runs the fused kernel. So every way of writing a
gated MLP is served, dense, packed or as experts, and none has to be recognised. Whatever else
happens to the activation computes it as before.

Small inputs and compiled code use the activation itself: there the fusion does not pay, or the
compiler does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from liger_trainer import probe
from liger_trainer.deferred import Attach, Deferred
from liger_trainer.kernels.glu import MIN_ELEMENTS, geglu, swiglu
from liger_trainer.kernels.runtime import pays
from liger_trainer.report import Row
from liger_trainer.rules.finding import SWITCHED_OFF, Finding, Search, fingerprint
from liger_trainer.swap import Swapped, swap, unswap


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


_OF_MANY_ELEMENTS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU)
_GATES = (Gate("swiglu"), Gate("geglu", "tanh"), Gate("geglu", "none"))


class DeferredActivation(Deferred):
    """activation(gate), computed when touched by anything but a multiplication."""

    handlers: ClassVar[dict[Callable, Callable]] = {}
    _gate: torch.Tensor
    _gate_version: int
    _form: Gate
    _owner: nn.Module

    @property
    def gate(self) -> torch.Tensor:
        """The activation's input, as it was when the activation was called."""
        if self._gate._version != self._gate_version:
            raise RuntimeError(
                "The input of a deferred activation was changed in place before its result was "
                "used. Switch it off: liger_kernel_config={'swiglu': False, 'geglu': False}"
            )
        return self._gate

    def compute(self) -> torch.Tensor:
        self._owner._liger_unfused = True  # not gated after all: do not defer again
        return self._form.activation(self.gate)


def _multiply(a, b, **kwargs):
    activation, up = (a, b) if isinstance(a, DeferredActivation) else (b, a)
    if kwargs or not torch.is_tensor(up) or isinstance(up, Deferred):
        return NotImplemented
    if up.shape != activation.shape or up.device != activation.device:
        return NotImplemented
    return activation._form.product(activation.gate, up)


for _function in (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply,
                  torch.Tensor.__mul__, torch.Tensor.__rmul__):  # fmt: skip
    DeferredActivation.handlers[_function] = _multiply


class FusedActivation(Swapped):
    """forward(x) returns a deferred activation where a fused product would pay."""

    _liger_unfused = False

    def forward(self, x):
        if (
            self._liger_unfused
            or torch.compiler.is_compiling()
            or not pays(x, MIN_ELEMENTS)
            or torch.is_inference_mode_enabled()
        ):
            return super().forward(x)
        return defer_activation(self, x)


def defer_activation(owner: nn.Module, x: torch.Tensor) -> DeferredActivation:
    form = owner._liger_key[0]

    def make():
        deferred = DeferredActivation(x.shape, x.dtype, x.device)
        deferred._gate, deferred._gate_version = x, x._version
        deferred._form, deferred._owner = form, owner
        return deferred

    return Attach.apply(make, form.activation, x)


def examine(search: Search, site: str, module: nn.Module) -> Finding | None:
    """Looks at each child of `module` that is an activation."""
    for name, child in module.named_children():
        if type(child).__module__.split(".")[-1] not in ("activations", "activation"):
            continue
        if next(child.parameters(), None) is not None or isinstance(child, _OF_MANY_ELEMENTS):
            continue
        return _examine_activation(search, site, module, name, child)
    return None


def _examine_activation(search, site, module, name, child) -> Finding:
    device = search.device_of(module)
    gate, verdict = search.once(
        ("gate", fingerprint(child, device)), lambda: identify(child, device)
    )
    rule = gate.rule if gate else "swiglu"
    gated = search.once(("gated", fingerprint(module, device)), lambda: is_gated(module, child))
    if gated is False:
        reason = f"not gated: the result of {name} is not multiplied with another projection"
        return Finding(Row(site, rule, False, reason, eligible=False))
    if gate is None:
        reason = f"{type(child).__name__} {verdict.reason}"
        return Finding(Row(site, rule, False, reason, eligible=gated is True))
    if not getattr(search.config, rule):
        return Finding(Row(site, rule, False, SWITCHED_OFF, verdict.max_error, eligible=False))
    row = Row(site, rule, True, f"{name} times its gate", verdict.max_error)
    return Finding(row, child, FusedActivation, (gate,))


def identify(child: nn.Module, device: torch.device) -> tuple[Gate | None, probe.Verdict]:
    """The gate whose product equals `child(gate) * up`."""
    found = []
    for gate in _GATES:
        verdict = probe.compare(lambda x, up: child(x) * up, gate.product, _cases(device))
        if verdict.equal:
            found.append((gate, verdict))
    if found:
        return min(found, key=lambda pair: pair[1].max_error)
    return None, probe.Verdict(False, None, "is neither SiLU nor GELU")


def _cases(device: torch.device) -> Iterator[probe.Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for scale in probe.SCALES:
            gate, up = (probe.draw((4, 33), scale, device, i).to(dtype) for i in range(2))
            inputs = (gate.requires_grad_(), up.requires_grad_())
            yield probe.Case(inputs, f"{dtype} input of size {scale:g}")


def is_gated(module: nn.Module, activation: nn.Module) -> bool | None:
    """Whether `module` multiplies what `activation` returns; None if that cannot be found out.

    Found by running the module on the meta device, where nothing is computed. A module that takes
    more than one tensor (experts and their routing) cannot be run so; some say it themselves
    (`has_gate`). Not to know is no danger: the swap is right either way, and at run time a product
    that does not come turns the deferral off again.
    """
    if hasattr(module, "has_gate"):
        return bool(module.has_gate)
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    matrices = [tensor for tensor in meta.values() if tensor.dim() == 2]
    widths = dict.fromkeys(size for matrix in matrices for size in reversed(matrix.shape))
    swap(activation, _Recorder)
    try:
        for width in widths:  # which of them the input has is the module's secret
            activation.multiplied = False
            x = torch.empty(2, 3, width, device="meta", dtype=matrices[0].dtype)
            try:
                with torch.no_grad():
                    torch.func.functional_call(module, meta, (x,))
            except Exception:  # another width, or a forward that cannot run so
                continue
            return activation.multiplied
        return None
    finally:
        unswap(activation)
        vars(activation).pop("multiplied", None)


class _Recorder(Swapped):
    """Stands in for the activation on the meta device and notes what is done to its result."""

    def forward(self, x):
        deferred = _Recorded(x.shape, x.dtype, x.device)
        deferred._gate, deferred._owner = x, self
        return deferred


class _Recorded(Deferred):
    handlers: ClassVar[dict[Callable, Callable]] = {}

    def compute(self):
        return torch.empty_like(self._gate)


def _note(a, b, **kwargs):
    recorded, other = (a, b) if isinstance(a, _Recorded) else (b, a)
    recorded._owner.multiplied |= torch.is_tensor(other) and other.shape == recorded.shape
    return torch.empty_like(recorded._gate)


for _function in DeferredActivation.handlers:
    _Recorded.handlers[_function] = _note
