"""Layer kernels against their peers: python benchmarks/layers.py

bf16, forward and backward: TB/s of device time (CUDA graph replays), then milliseconds of device
time and of wall time, where the host's launches count too. TB/s counts the fewest passes over
memory that the operation needs (norms 5, SwiGLU 8, RoPE 4, cross entropy 3). `copy` is the
bandwidth of a plain device-to-device copy.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timing import add_case_option, chosen_cases, environment, measure, measure_graph, print_table

from liger_trainer.kernels.layers.glu import geglu, swiglu
from liger_trainer.kernels.layers.layer_norm import layer_norm
from liger_trainer.kernels.layers.rms_norm import rms_norm, rms_norm_reference
from liger_trainer.kernels.layers.rope import rope, rope_reference
from liger_trainer.kernels.logits.cross_entropy import cross_entropy

BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def leaf(*shape):
    # A generator of its own: a failed graph capture leaves the default one unusable.
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, generator=generator, **BF16).requires_grad_()


def liger(name):
    try:
        from liger_kernel import ops
    except ImportError:
        return None
    return getattr(ops, name)


def rms_norm_case(rows, width):
    x, w = leaf(rows, width), leaf(width)
    eager = lambda: rms_norm_reference(x, w, eps=1e-6)  # noqa: E731
    peer = liger("LigerRMSNormFunction")
    return [x, w], 5 * 2 * rows * width, {
        "liger_trainer": lambda: rms_norm(x, w, eps=1e-6),
        "eager": eager,
        "F.*": lambda: F.rms_norm(x, (width,), w, 1e-6),
        "compile": torch.compile(eager),
        "liger": peer and (lambda: peer.apply(x, w, 1e-6, 0.0, "llama", False)),
    }  # fmt: skip


def layer_norm_case(rows, width):
    x, w, b = leaf(rows, width), leaf(width), leaf(width)
    eager = lambda: F.layer_norm(x, (width,), w, b, 1e-6)  # noqa: E731
    peer = liger("LigerLayerNormFunction")
    return [x, w, b], 5 * 2 * rows * width, {
        "liger_trainer": lambda: layer_norm(x, w, b, eps=1e-6),
        "eager": eager,
        "compile": torch.compile(eager),
        "liger": peer and (lambda: peer.apply(x, w, b, 1e-6)),
    }  # fmt: skip


def swiglu_case(rows, width):
    a, b = leaf(rows, width), leaf(rows, width)
    eager = lambda: F.silu(a) * b  # noqa: E731
    peer = liger("LigerSiLUMulFunction")
    return [a, b], 8 * 2 * rows * width, {
        "liger_trainer": lambda: swiglu(a, b),
        "eager": eager,
        "compile": torch.compile(eager),
        "liger": peer and (lambda: peer.apply(a, b)),
    }  # fmt: skip


def geglu_case(rows, width):
    a, b = leaf(rows, width), leaf(rows, width)
    eager = lambda: F.gelu(a, approximate="tanh") * b  # noqa: E731
    peer = liger("LigerGELUMulFunction")
    return [a, b], 8 * 2 * rows * width, {
        "liger_trainer": lambda: geglu(a, b, approximate="tanh"),
        "eager": eager,
        "compile": torch.compile(eager),
        "liger": peer and (lambda: peer.apply(a, b)),
    }  # fmt: skip


def rope_case(batch, length, heads, kv_heads, width):
    q = leaf(batch, length, heads, width)
    k = leaf(batch, length, kv_heads, width)
    angle = leaf(1, length, width // 2).detach().float().repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    views = lambda: (q.transpose(1, 2), k.transpose(1, 2))  # noqa: E731
    eager = lambda: rope_reference(*views(), cos, sin)  # noqa: E731
    peer = liger("LigerRopeFunction")
    return [q, k], 4 * 2 * (q.numel() + k.numel()), {
        "liger_trainer": lambda: rope(*views(), cos, sin),
        "eager": eager,
        "compile": torch.compile(eager),
        "liger": peer and (lambda: peer.apply(*views(), cos, sin)),
    }  # fmt: skip


def cross_entropy_case(rows, vocab):
    z = leaf(rows, vocab)
    y = torch.arange(rows, device="cuda") * 7919 % vocab
    eager = lambda: F.cross_entropy(z.float(), y)  # noqa: E731
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy as peer
    except ImportError:
        peer = None
    return [z], 3 * 2 * rows * vocab, {
        "liger_trainer": lambda: cross_entropy(z, y),
        "eager": eager,
        "compile": torch.compile(eager),
        # It overwrites its logits: give it a fresh graph on the same storage.
        "liger": peer and (lambda: peer(z.detach().requires_grad_(), y)),
    }  # fmt: skip


CASES = {
    "RMSNorm 16384 x 2048": lambda: rms_norm_case(16384, 2048),
    "RMSNorm 16384 x 4096": lambda: rms_norm_case(16384, 4096),
    "RMSNorm 16384 x 8192": lambda: rms_norm_case(16384, 8192),
    "RMSNorm 16384 x 16384": lambda: rms_norm_case(16384, 16384),
    "RMSNorm 524288 x 128": lambda: rms_norm_case(524288, 128),
    "LayerNorm 16384 x 4096": lambda: layer_norm_case(16384, 4096),
    "SwiGLU 16384 x 14336": lambda: swiglu_case(16384, 14336),
    "GeGLU 16384 x 14336": lambda: geglu_case(16384, 14336),
    "RoPE B4 S4096 32/8 x 128": lambda: rope_case(4, 4096, 32, 8, 128),
    "CE 8192 x 32000": lambda: cross_entropy_case(8192, 32000),
    "CE 8192 x 128256": lambda: cross_entropy_case(8192, 128256),
    "RMSNorm 512 x 2048": lambda: rms_norm_case(512, 2048),
    "SwiGLU 512 x 8192": lambda: swiglu_case(512, 8192),
    "SwiGLU 64 x 2048": lambda: swiglu_case(64, 2048),
    "RoPE B1 S512 32/8 x 64": lambda: rope_case(1, 512, 32, 8, 64),
}


def cell(step, size):
    try:
        wall, _ = measure(step, warmup=10, repeats=40)
    except Exception as error:  # a peer's failure is its result
        return type(error).__name__
    try:
        device = measure_graph(step)
    except RuntimeError:  # cannot be captured
        return f"{size / wall / 1e9:.2f} (wall {wall:.3f})"
    return f"{size / device / 1e9:.2f} ({device:.3f}, wall {wall:.3f})"


def copy_bandwidth():
    source = torch.randn(2**30, **BF16)
    return 2 * source.nbytes / measure(source.clone)[0] / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    options = parser.parse_args()
    columns = ["liger_trainer"] if options.ours else [
        "liger_trainer", "eager", "F.*", "compile", "liger"]  # fmt: skip
    print(f"copy: {copy_bandwidth():.2f} TB/s")
    rows = []
    for name in chosen_cases(CASES, options.case):
        leaves, size, contenders = CASES[name]()
        with torch.no_grad():
            first = contenders["liger_trainer"]()
        outputs = first if isinstance(first, tuple) else (first,)
        seeds = [torch.ones_like(o) if o.dim() == 0 else leaf(*o.shape).detach() for o in outputs]
        row = [name]
        for column in columns:
            fn = contenders.get(column)
            if not fn:
                row.append("")
                continue

            def step(fn=fn, leaves=leaves, seeds=seeds):
                for tensor in leaves:
                    tensor.grad = None
                result = fn()
                result = result if isinstance(result, tuple) else (result,)
                torch.autograd.backward(
                    result, [s.to(r.dtype) for s, r in zip(seeds, result, strict=True)]
                )

            row.append(cell(step, size))
        rows.append(row)
    print(environment())
    print_table(
        "Layer kernels, forward and backward: TB/s (device ms, wall ms)", ["case", *columns], rows
    )


if __name__ == "__main__":
    main()
