"""Two faults of Triton's interpreter (3.6) that would otherwise be taken for ours.

With numpy 2.4 or later it cannot use a runtime value as a loop bound, and it truncates fp32 to bf16
where the hardware rounds to nearest.
"""

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
