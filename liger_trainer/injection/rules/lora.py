"""LoRA on linear layers, as PEFT makes them: the base layer inside, adapters by name.

A layer is recognized by its tables of adapters, whose names PEFT gives to layers of any class, and
verified on a small copy: the same class and settings, all adapters active, other sizes. Whatever
may change between two calls (which adapters are active, merged or disabled, their scales, hooks) is
read at every call. If the fused operation does not apply, the layer's own forward runs.

Adapters on the output head belong to the head's rule.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from liger_trainer.hooks import call_nested, is_hooked, only_gathered
from liger_trainer.injection import probe
from liger_trainer.injection.rules.proposal import Proposal, Search, Swap
from liger_trainer.kernels.layers.lora_linear import Adapter, add_adapters, lora_linear
from liger_trainer.kernels.runtime import every_size, is_looked_into
from liger_trainer.swap import Swapped, is_current, note, swap

RULE = "lora"
_PLAIN = (torch.Tensor, nn.Parameter)
_PLAIN_FORWARD = nn.Linear.forward  # kept, because code may replace it for the whole process
_WIDTHS = 24, 40  # inputs and outputs of the copy that is probed
_TOLERANCE_FP64 = 1e-10


class FusedLoRA(Swapped):
    """A LoRA layer whose forward is one operation where that applies, and PEFT's elsewhere."""

    def forward(self, x, *args, **kwargs):
        if not is_current(self):
            return self._liger_base.forward(self, x, *args, **kwargs)
        usual = not (args or kwargs)
        base = self._modules["base_layer"]
        gathered = _gathered_modules(self) if usual and base._forward_pre_hooks else None
        adapters = active_adapters(self, x, gathered is not None) if usual else None
        if not adapters:
            if usual and not is_looked_into():
                note(self, _unfit(self, gathered is not None))
            return self._liger_base.forward(self, x, *args, **kwargs)
        note(self, None)
        if gathered is not None:
            return _fused_where_gathered(gathered, x, adapters)
        if not is_hooked(base) and _is_plain_linear(base, x):
            return lora_linear(x, base.weight, base.bias, adapters)
        return add_adapters(base(x), x, adapters)


def active_adapters(
    layer: nn.Module, x: torch.Tensor, gathered: bool = False
) -> list[Adapter] | None:
    """Return the adapters that apply to `x` now; None if only the layer's own forward will do.

    `gathered` means that hooks gather the matrices when their modules are called. Until then these
    are empty, and reading them by attribute may gather them here.
    """
    if layer.disable_adapters or layer.merged or is_looked_into():
        return None
    if type(x) not in _PLAIN or not x.is_floating_point() or _is_sharded(layer.base_layer):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    found = []
    for name in layer.active_adapters:
        parts = _parts_of(layer, name)
        if parts is None:
            continue
        if _variant(layer, name, parts) is not None:
            return None
        if not gathered and is_hooked(*parts):
            return None
        down, up, dropout = parts
        A, B = down._parameters.get("weight"), up._parameters.get("weight")
        scale = layer.scaling[name]
        if type(A) not in _PLAIN or type(B) not in _PLAIN or not isinstance(scale, (int, float)):
            return None
        if A.dtype != B.dtype or not (gathered or (A.device == x.device and A.numel())):
            return None
        if autocast and torch.float64 in (x.dtype, A.dtype):  # autocast does not cast fp64
            return None
        if not autocast and A.dtype != x.dtype:
            widens = torch.promote_types(A.dtype, x.dtype) == A.dtype
            if not (widens and getattr(layer, "cast_input_dtype_enabled", True)):
                return None
        found.append(Adapter(A, B, scale, dropout.p if _drops(dropout) else 0.0))
    return found


def _gathered_modules(layer: nn.Module) -> list[nn.Module] | None:
    """Return the base layer and the A and B modules of each active adapter, if an engine's hooks
    gather their weights on each call; else None."""
    if is_looked_into():
        return None
    found = [layer.get_submodule("base_layer")]
    for name in layer.active_adapters:
        parts = _parts_of(layer, name)
        if parts is not None:
            down, up, dropout = parts
            if not only_gathered((layer.base_layer, down, up), bystander=dropout):
                return None
            found += [down, up]
    return found  # pyright: ignore[reportReturnType]


def _fused_where_gathered(
    modules: list[nn.Module], x: torch.Tensor, adapters: list[Adapter]
) -> torch.Tensor:
    """Run the operation inside calls of all `modules`, which are in the order of PEFT's calls."""
    base, *matrices = modules

    def whole() -> list[Adapter]:
        pairs = zip(adapters, matrices[::2], matrices[1::2], strict=True)
        return [adapter._replace(A=down.weight, B=up.weight) for adapter, down, up in pairs]

    def everything(x: torch.Tensor) -> torch.Tensor:
        if _is_plain_linear(base, x):
            return lora_linear(x, base.weight, base.bias, whole())
        return add_adapters(_PLAIN_FORWARD(base, x), x, whole())

    if type(base).forward is _PLAIN_FORWARD and _needs_backward(base, x):
        return call_nested(modules, x, everything)
    y = base(x)
    return call_nested(matrices, x, lambda x: add_adapters(y, x, whole()))


def _needs_backward(base: nn.Module, x: torch.Tensor) -> bool:
    """Return whether `base` takes part in backward, for which its weight is gathered again.

    Without gradients it makes no difference, so the answer is True.
    """
    tensors = (x, *base.parameters(recurse=False))
    return not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors)


_TABLES = ("lora_A", "lora_B", "lora_dropout")


def _parts_of(layer: nn.Module, name: str) -> tuple[nn.Module, ...] | None:
    """Return A, B and the dropout of an adapter, or None if the layer does not have it."""
    modules = layer._modules  # attribute access to the tables would take 2 us
    downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
    if name not in downs:
        return None
    return downs[name], ups[name], modules["lora_dropout"]._modules[name]  # pyright: ignore


def _unfit(layer: nn.Module, gathered: bool) -> str | None:
    """Return why the layer's own forward must run whatever the input is, or None."""
    found = {name: _parts_of(layer, name) for name in layer.active_adapters}
    active = {name: parts for name, parts in found.items() if parts is not None}
    if layer.disable_adapters or layer.merged or not active:
        return None  # nothing is added
    for name, parts in active.items():
        if (variant := _variant(layer, name, parts)) is not None:
            return f"not plain LoRA: {variant}"
        if not gathered and is_hooked(*parts):
            return "hooks on the adapter"
    return "its base layer lies in shards" if _is_sharded(layer.base_layer) else None


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and type(dropout) is nn.Dropout and dropout.p > 0.0


def _variant(layer: nn.Module, name: str, parts: tuple[nn.Module, ...]) -> str | None:
    """Return why the adapter is not plain LoRA on a linear layer, or None."""
    variants = vars(layer).get("lora_variant", ())
    if name in variants:
        return f"the variant {type(variants[name]).__name__}"
    down, up, dropout = parts
    for part in (down, up):
        if type(part) is not nn.Linear:
            return f"adapters of type {type(part).__name__}"
    if down._parameters.get("bias") is not None or up._parameters.get("bias") is not None:
        return "a bias of the adapter"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout by {type(dropout).__name__}"
    return None


def _is_plain_linear(base: nn.Module, x: torch.Tensor) -> bool:
    if type(base).forward is not _PLAIN_FORWARD:
        return False
    weight = base.weight
    if type(weight) not in _PLAIN or not weight.is_floating_point() or weight.dim() != 2:
        return False
    return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def _is_sharded(base: nn.Module) -> bool:
    weight = base._parameters.get("weight")
    if weight is None:  # parametrized, or of another name
        weight = getattr(base, "weight", None)
    return type(weight) not in _PLAIN and hasattr(weight, "device_mesh")  # a DTensor


def propose(search: Search, site: str, module: nn.Module) -> Proposal | None:
    """Propose the fused operation for a linear layer with LoRA adapters."""
    if not _looks_like_lora(module):
        return None
    if module is search.output_embeddings:
        return None
    if not search.config.lora:
        return Proposal.off(site, RULE)
    if hasattr(module, "parameter_name"):
        reason = f"adapts the parameter {module.parameter_name}, not a linear layer"
        return Proposal.refused(site, RULE, reason)
    variants = {name: _variant(module, name, _parts_of(module, name)) for name in module.lora_A}
    plain = [name for name, variant in variants.items() if variant is None]
    if not plain:
        return Proposal.refused(site, RULE, f"not plain LoRA: {next(iter(variants.values()))}")
    device = search.device_of(module)
    key = type(module), tuple(module.scaling.items()), tuple(plain), str(device)
    verdict = search.cached(("lora", key), lambda: prove(module, plain, device))
    if not verdict.equal:
        return Proposal.refused(site, RULE, verdict.reason, verdict.max_error)
    reason = "adapters added in place, their input kept once"
    swap = Swap(module, FusedLoRA)
    return Proposal.swapped(site, RULE, reason, swap, max_error=verdict.max_error)


def _looks_like_lora(module: nn.Module) -> bool:
    tables = (getattr(module, name, None) for name in _TABLES)
    return (
        isinstance(getattr(module, "base_layer", None), nn.Module)
        and all(isinstance(table, nn.ModuleDict) and len(table) > 0 for table in tables)
        and isinstance(getattr(module, "scaling", None), dict)
    )


def prove(module: nn.Module, names: list[str], device: torch.device) -> probe.Verdict:
    """Compare the fused operation with the layer's forward.

    In fp64 both must agree: in fp32, GEMMs may differ by the rounding of TF32. In 16 bits the rule
    is that of `probe.compare`. The difference in fp32 is only reported.
    """
    twin = probe.random_copy(_small_copy(module, names), device).eval()
    fused = copy.deepcopy(twin)
    swap(fused, FusedLoRA)
    (original, parameters), (candidate, _) = map(probe.with_parameters, (twin, fused))
    base = {id(parameter) for parameter in twin.base_layer.parameters()}
    is_adapter = [id(parameter) not in base for parameter in parameters]
    for case in _cases(parameters, is_adapter, torch.float64, torch.float64, device):
        try:
            expected = probe.evaluate(original, case)
        except Exception as error:  # third-party modules may raise anything
            return probe.Verdict(False, None, f"cannot be run on its own: {error}"[:100])
        got = probe.evaluate(candidate, case)
        error = max(map(probe.relative_error, got, expected))
        if not error <= _TOLERANCE_FP64:
            return probe.Verdict(False, None, f"differs by {error:.1e} for {case.label}")
    low = torch.bfloat16
    for adapter_dtype in (low, torch.float32):
        cases = _cases(parameters, is_adapter, low, adapter_dtype, device)
        verdict = probe.compare(original, candidate, cases)
        if not verdict.equal:
            return verdict
    errors = []
    for case in _cases(parameters, is_adapter, torch.float32, torch.float32, device):
        with every_size():
            got = probe.evaluate(candidate, case)
        errors += map(probe.relative_error, got, probe.evaluate(original, case))
    return dataclasses.replace(verdict, max_error=max(errors))


def _small_copy(module: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy with small weights, in which all adapters `names` are active, none merged."""
    inputs, outputs = _WIDTHS
    bias = getattr(module.base_layer, "bias", None) is not None
    memo = {id(module.base_layer): nn.Linear(inputs, outputs, bias)}
    for i, name in enumerate(module.lora_A):
        memo[id(module.lora_A[name])] = nn.Linear(inputs, 3 + i, bias=False)
        memo[id(module.lora_B[name])] = nn.Linear(3 + i, outputs, bias=False)
    twin = copy.deepcopy(module, memo)
    twin._active_adapter, twin._disable_adapters, twin.merged_adapters = names, False, []
    return twin


def _cases(
    parameters: list[nn.Parameter],
    is_adapter: list[bool],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
) -> Iterator[probe.Case]:
    for i, scale in enumerate(probe.SCALES):
        tensors = [probe.draw((2, 3, _WIDTHS[0]), scale, device, i).to(dtype)]
        for parameter, adapter in zip(parameters, is_adapter, strict=True):
            tensors.append(parameter.detach().to(adapter_dtype if adapter else dtype))
        label = f"{dtype} input of size {scale:g}, {adapter_dtype} adapters"
        yield probe.Case(tuple(t.requires_grad_() for t in tensors), label)
