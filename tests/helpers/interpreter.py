"""Two faults of Triton's interpreter (3.7), which would be taken for ours, and its overhead.

With numpy 2.4 or later it cannot use a runtime value as a loop bound, and it truncates fp32 to bf16
where the hardware rounds to nearest.
"""

import functools
import inspect
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_rounding(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(data.view("float32").copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, rounding_mode)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter._convert_float = convert_rounding
    _patch_language_once_per_launch()
    _look_up_numpy_dtypes_once()


def _patch_language_once_per_launch() -> None:
    """Patch `triton.language` when a kernel starts, not at each call of a function inside it, too.

    Half of the time of interpreted kernels went there.
    """
    patch_language = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    @functools.cache
    def builtins(package):
        return [pair for pair in inspect.getmembers(package) if tl.core.is_builtin(pair[1])]

    def patch_builtins(package, builder, scope):
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang = lambda kernel: patch_language(language)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
        *args, **kwargs
    )


def _look_up_numpy_dtypes_once() -> None:
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    pointer = numpy_dtype(tl.uint64)

    def look_up(kind):
        scalar = kind.scalar
        return pointer if isinstance(scalar, tl.pointer_type) else numpy_dtype(scalar)

    interpreter._get_np_dtype = look_up
