"""Launch kernels that run many times per step, at two thirds of the host cost.

At each launch Triton works out which of its compiled variants fits the arguments: 7 us in all on a
fast CPU, where `launch` takes 4.4. The variant depends on the tensors' dtypes and alignment, on
whether an integer is 1, divisible by 16 or wider than 32 bits, and on the constants. The same
variant fits whenever all dtypes, alignments, integers and constants are those of an earlier launch,
which is quicker to see.
"""

from __future__ import annotations

import torch

_MOST = 1024  # where lengths differ from batch to batch, few entries are used twice
_variants: dict[tuple, tuple] = {}


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Run `kernel[grid](*arguments, **constants)`.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes.
        arguments: those that come first in the kernel's signature; the first one is a tensor, on
            the current device.
        constants: the rest of the signature, and options of the compiler.
    """
    key = _key(kernel, arguments, constants)
    found = _variants.get(key)
    if found is None:
        variant = kernel[grid](*arguments, **constants)
        if _is_reusable(variant):
            if len(_variants) >= _MOST:
                _variants.clear()
            rest = kernel.arg_names[len(arguments) :]
            _variants[key] = kernel, variant, tuple(constants[name] for name in rest)
        return
    _, variant, rest = found
    variant[(*grid, 1, 1)[:3]](*arguments, *rest)


def _key(kernel, arguments: tuple, constants: dict) -> tuple:
    # The id, for Triton's own hash is slow; the entry holds the kernel, so that the id stays its.
    key = [id(kernel), arguments[0].device]
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is bool or argument is None:
            key += kind, argument  # True is not 1
        elif kind is float:
            key.append(kind)  # its value does not matter
        else:
            key += argument.dtype, argument.data_ptr() % 16
    return (*key, *constants.values())


def _is_reusable(variant) -> bool:
    """Whether it is a compiled kernel; the interpreter has none, and on AMD sizes matter, too."""
    return hasattr(variant, "packed_metadata") and torch.version.hip is None
