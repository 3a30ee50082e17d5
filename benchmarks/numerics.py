"""How exact each kernel is, beside torch in the same dtype: python benchmarks/numerics.py

Relative L2 error against fp64, of the output and of the worst gradient: ours / torch's. On a CPU
the same kernels run through Triton's interpreter, at small sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from timing import environment, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.repair()

from oracle import run

from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers.glu import geglu, geglu_reference, swiglu, swiglu_reference
from liger_trainer.kernels.layers.layer_norm import layer_norm, layer_norm_reference
from liger_trainer.kernels.layers.rms_norm import rms_norm, rms_norm_reference
from liger_trainer.kernels.layers.rope import rope, rope_reference
from liger_trainer.kernels.linear.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from liger_trainer.kernels.logits.cross_entropy import cross_entropy
from liger_trainer.kernels.logits.loss import LossOptions, cross_entropy_reference


def cases(rows: int, width: int, vocab: int):
    """name -> (kernel, reference, shapes of the tensors they take by name)."""
    labels = torch.arange(rows) * 7 % vocab
    labels[::3] = -100
    norm = {"x": (rows, width), "weight": (width,)}
    gated = {"gate": (rows, width), "up": (rows, width)}
    heads = {"q": (2, 4, rows // 2, 64), "k": (2, 2, rows // 2, 64)}
    table = torch.randn(1, rows // 2, 64)
    angles = {"cos": table.cos(), "sin": table.sin()}
    head = {"hidden": (rows, width), "weight": (vocab, width)}
    capped = LossOptions(label_smoothing=0.1, z_loss=1e-3, softcap=20.0)

    def rotate(function):
        return lambda q, k: function(q, k, *(t.to(q.device, q.dtype) for t in angles.values()))

    def head_loss(options, max_rows=None):
        def kernel(hidden, weight):
            return linear_cross_entropy(
                hidden, weight, labels.to(hidden.device), reduction="sum", options=options,
                max_rows=max_rows,
            )  # fmt: skip

        def reference(hidden, weight):
            return linear_cross_entropy_reference(
                [hidden], [weight], labels.to(hidden.device), options=options
            ).sum()

        return kernel, reference, head

    return {
        "RMSNorm": (
            lambda x, weight: rms_norm(x, weight, eps=1e-6),
            lambda x, weight: rms_norm_reference(x, weight, eps=1e-6),
            norm,
        ),
        "RMSNorm, 1 + weight": (
            lambda x, weight: rms_norm(x, weight, eps=1e-6, offset=1.0, cast_first=False),
            lambda x, weight: rms_norm_reference(x, weight, eps=1e-6, offset=1.0, cast_first=False),
            norm,
        ),
        "LayerNorm": (
            lambda x, weight: layer_norm(x, weight, eps=1e-6),
            lambda x, weight: layer_norm_reference(x, weight, eps=1e-6),
            norm,
        ),
        "SwiGLU": (swiglu, swiglu_reference, gated),
        "GeGLU": (geglu, geglu_reference, gated),
        "RoPE": (rotate(rope), rotate(rope_reference), heads),
        "cross entropy": (
            lambda z: cross_entropy(z, labels.to(z.device), reduction="none"),
            lambda z: cross_entropy_reference(z, labels.to(z.device)),
            {"z": (rows, vocab)},
        ),
        "linear cross entropy": head_loss(LossOptions()),
        "the same, 4 workspaces": head_loss(LossOptions(), max_rows=max(1, rows // 4)),
        "the same, softcap, smoothing, z-loss": head_loss(capped),
    }


def errors(function, tensors, truth, seeds):
    """Return the relative L2 errors of the outputs and of the worst gradient."""
    outputs, grads, _ = run(function, tensors, seeds)
    true_outputs, true_grads, _ = truth

    def relative(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    return (
        max(relative(a, b) for a, b in zip(outputs, true_outputs, strict=True)),
        max(relative(grads[name], b) for name, b in true_grads.items()),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048 if torch.cuda.is_available() else 32)
    parser.add_argument("--width", type=int, default=4096 if torch.cuda.is_available() else 128)
    parser.add_argument("--vocab", type=int, default=50257 if torch.cuda.is_available() else 301)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = runtime.every_size if device == "cuda" else runtime.interpreted
    torch.manual_seed(0)
    rows = []
    for name, (kernel, reference, shapes) in cases(**vars(options)).items():
        row = [name]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scale = {"weight": 0.1}
            tensors = {
                key: (torch.randn(shape) * scale.get(key, 1.0)).to(device, dtype)
                for key, shape in shapes.items()
            }
            exact = {key: tensor.double() for key, tensor in tensors.items()}
            truth = run(reference, exact)
            with kernels():
                ours = errors(kernel, tensors, truth, truth[2])
            theirs = errors(reference, tensors, truth, truth[2])
            row += [f"{a:.1e} / {b:.1e}" for a, b in zip(ours, theirs, strict=True)]
        rows.append(row)
    print(environment())
    columns = [
        f"{dtype} {what}" for dtype in ("fp32", "bf16", "fp16") for what in ("output", "gradient")
    ]
    print_table("Relative L2 error against fp64, ours / torch's", ["operation", *columns], rows)


if __name__ == "__main__":
    main()
