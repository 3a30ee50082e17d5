"""Compile every Triton kernel for an H100, where there is no GPU: python compile_for_gpu.py

The interpreter takes Python for Triton. What only the compiler refuses it runs: a method of a size,
say, which is a constant where the size is 1. Here the kernels of every operation, forward and
backward, are compiled. A driver takes the place of CUDA's and launches nothing, so results mean
nothing. Prints one line for each call that does not compile.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is decorated

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        pass


class NoDriver:
    """The part of a driver that Triton calls."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(NoDriver())

from liger_trainer.kernels.layers.gated_rms_norm import gated_rms_norm  # noqa: E402
from liger_trainer.kernels.layers.glu import geglu, swiglu  # noqa: E402
from liger_trainer.kernels.layers.layer_norm import layer_norm  # noqa: E402
from liger_trainer.kernels.layers.lora_in_parts import InParts  # noqa: E402
from liger_trainer.kernels.layers.lora_in_registers import InRegisters  # noqa: E402
from liger_trainer.kernels.layers.rms_norm import rms_norm  # noqa: E402
from liger_trainer.kernels.layers.rope import rope  # noqa: E402
from liger_trainer.kernels.linear.supervised import partition  # noqa: E402
from liger_trainer.kernels.logits.cross_entropy import cross_entropy  # noqa: E402
from liger_trainer.kernels.logits.divergence import divergence  # noqa: E402
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions  # noqa: E402
from liger_trainer.kernels.logits.log_probs import log_probs  # noqa: E402
from liger_trainer.kernels.logits.loss import LossOptions  # noqa: E402
from liger_trainer.kernels.runtime import interpreted  # noqa: E402


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).requires_grad_()


def lora_products(products, x, A, B):
    y = torch.zeros(len(x), len(B), dtype=x.dtype)
    h = products.add_product(y, x, A, B.t(), 0.5)
    products.gradient_a(products.add_product(x, y, B.t(), A, 0.5, 0), x)
    products.gradient_b(y, h)


def calls(rows: int, width: int):
    """Return the names of operations, and their calls on `rows` of `width`."""
    x, weight, bias = leaf(rows, width), leaf(width), leaf(width)
    labels = torch.zeros(rows, dtype=torch.int64)
    yield "rms_norm", lambda: rms_norm(x, weight, eps=1e-6)
    yield "rms_norm, offset", lambda: rms_norm(x, weight, eps=1e-6, offset=1.0, cast_first=False)
    yield "layer_norm", lambda: layer_norm(x, weight, bias, eps=1e-6)
    yield "gated_rms_norm", lambda: gated_rms_norm(x, leaf(rows, width), weight, eps=1e-6)
    yield "swiglu", lambda: swiglu(x, leaf(rows, width))
    for kind in ("tanh", "none"):
        yield f"geglu, {kind}", lambda kind=kind: geglu(x, leaf(rows, width), approximate=kind)
    latent = ("interleaved", "split", "half_table")
    for pairs in ((), ("interleaved",), latent, ("interleaved", "narrow_table", "trailing")):
        heads = (leaf(1, width, rows, 2 * width), leaf(1, 1, rows, 2 * width))
        table = torch.randn(1, rows, width if "trailing" in pairs else 2 * width)
        yield (
            f"rope, {' '.join(pairs)}",
            lambda p=pairs, h=heads, t=table: rope(*h, t, t, **dict.fromkeys(p, True)),
        )
        if "narrow_table" in pairs:
            parts = torch.randn(1, rows, width, 2).unbind(-1)
            yield "rope, complex table", lambda h=heads, t=parts: rope(*h, *t, narrow_table=True)
    A, B = leaf(rows, width, dtype=torch.float32), leaf(5, rows, dtype=torch.float32)
    for products in (InRegisters(exact=True), InRegisters(exact=False), InParts()):
        yield f"LoRA products {products}", lambda p=products: lora_products(p, x.detach(), A, B)
    options = {
        "": {},
        "smoothing": {"label_smoothing": 0.1},
        "z-loss, softcap": {"z_loss": 1e-4, "softcap": 30.0},
    }
    for name, fields in options.items():
        yield (
            f"cross_entropy, {name}",
            lambda f=fields: cross_entropy(x, labels, options=LossOptions(**f), reduction="none"),
        )
    yield (
        "cross_entropy, class weights",
        lambda: cross_entropy(x, labels, class_weight=torch.ones(width)),
    )
    yield "log_probs", lambda: log_probs(x, labels)
    for alpha in (0.0, 0.5, 1.0):
        yield (
            f"divergence, {alpha}",
            lambda a=alpha: divergence(x, leaf(rows, width).detach(), DivergenceOptions(a)),
        )
    yield "partition", lambda: partition(labels, width, -100, want_order=True)


def backward(result) -> None:
    results = result if isinstance(result, tuple) else (result,)
    for r in results:
        if torch.is_tensor(r) and r.requires_grad:
            torch.autograd.backward(r, torch.ones_like(r), retain_graph=True)


def main() -> int:
    failures = 0
    with interpreted():
        for rows, width in itertools.product((1, 17), (1, 48)):
            for name, call in calls(rows, width):
                try:
                    backward(call())
                except Exception as error:
                    failures += 1
                    print(f"{name}, {rows} x {width}: {type(error).__name__}: {error}"[-500:])
    return failures


if __name__ == "__main__":
    sys.exit(bool(main()))
