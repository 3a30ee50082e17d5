"""Launch kernels that run many times per step, at two thirds of the host cost.

At each launch Triton works out which of its compiled variants fits the arguments, so that a launch
takes 6 us on a fast CPU; `launch` takes 3.7. The variant depends on the tensors' dtypes and
alignment, on whether an integer is 1, divisible by 16 or wider than 32 bits, and on the constants.
`launch` looks it up by a stricter key that is cheaper to build: the grid and all dtypes,
alignments, integers and constants are equal to those of an earlier launch. It also asks torch for
the current stream, which is quicker than Triton's way.
"""

from __future__ import annotations

import torch

_MAX_VARIANTS = 1024  # if lengths differ from batch to batch, few entries are ever reused
_variants: dict[tuple, tuple] = {}


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Run `kernel[grid](*arguments, **constants)`.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes.
        arguments: the leading parameters of the kernel; the first one is a tensor on the current
            device.
        constants: the kernel's other parameters, and compiler options such as `num_warps`. Their
            values should be quick to hash, which Triton's dtypes are not.
    """
    device = arguments[0].device
    key = _key(kernel, grid, device, arguments, constants)
    found = _variants.get(key)
    if found is None:
        variant = kernel[grid](*arguments, **constants)
        if _is_reusable(variant):
            if len(_variants) >= _MAX_VARIANTS:
                _variants.clear()
            rest = kernel.arg_names[len(arguments) :]
            run = variant[(*grid, 1, 1)[:3]]
            _variants[key] = kernel, run, tuple(constants[name] for name in rest)
        return
    _, run, rest = found
    index = device.index
    stream = None if index is None else torch._C._cuda_getCurrentRawStream(index)
    run(*arguments, *rest, stream=stream)


def _key(kernel, grid: tuple, device: torch.device, arguments: tuple, constants: dict) -> tuple:
    # By id, because Triton's own hash is slow. The entry holds the kernel, so no other gets its id.
    key = [id(kernel), grid, device]
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is bool or argument is None:
            key += kind, argument  # True is not 1
        elif kind is float:
            key.append(kind)  # no variant depends on the value of a float
        else:
            key += argument.dtype, argument.data_ptr() % 16
    return (*key, *constants.values())


def _is_reusable(variant) -> bool:
    """Return whether `variant` is a compiled kernel that fits every launch with the same key.

    The interpreter compiles nothing, and on AMD the variant also depends on tensor sizes.
    """
    return hasattr(variant, "packed_metadata") and torch.version.hip is None
