"""Attention of packed rows against its peers: python benchmarks/packed_attention.py

bf16, forward and backward, milliseconds (peak MiB beyond inputs). Documents have random lengths.

    ours          `packed_attention`: torch's FlashAttention by the documents' bounds
    mask          sdpa with the block-diagonal mask, keys repeated, as transformers calls it
    causal        sdpa over whole rows: what is lost by packing nothing apart (another result)
    flex          torch.compile(flex_attention) with a block mask, made beforehand

`bounds` is what finding the documents takes, once per batch; masks are made beforehand. Before it
is timed a contender's output and gradients are compared with those of the mask in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import add_case_option, chosen_cases, environment, measure, print_table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from liger_trainer.kernels.layers.packed_attention import dense_mask, documents_of, packed_attention


class Case(NamedTuple):
    rows: int
    length: int
    heads: int
    kv_heads: int
    size: int
    documents: int  # in a row
    window: int | None = None


CASES = {
    "4 x 4096, 32/8 of 128, 8 documents": Case(4, 4096, 32, 8, 128, 8),
    "2 x 8192, 32/8 of 128, 8 documents": Case(2, 8192, 32, 8, 128, 8),
    "1 x 16384, 32/8 of 128, 32 documents": Case(1, 16384, 32, 8, 128, 32),
    "8 x 4096, 32/8 of 64, 8 documents": Case(8, 4096, 32, 8, 64, 8),
    "4 x 4096, 8/4 of 256, 8 documents": Case(4, 4096, 8, 4, 256, 8),
    "4 x 4096, 8/4 of 256, 1 document, window 512": Case(4, 4096, 8, 4, 256, 1, 512),
    "4 x 4096, 32/8 of 128, 8 documents, window 256": Case(4, 4096, 32, 8, 128, 8, 256),
    "4 x 512, 16/8 of 128, 8 documents": Case(4, 512, 16, 8, 128, 8),
}
CONTENDERS = ("ours", "mask", "causal", "flex")
TOLERANCE = 0.02  # relative L2 error of bf16 against fp32


def positions(case: Case) -> torch.Tensor:
    """Return position ids [rows, length]; every document has at least one token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(case.rows):
        cuts = 1 + torch.randperm(case.length - 1, generator=generator)[: case.documents - 1]
        ends = [0, *sorted(cuts.tolist()), case.length]
        rows.append([i for a, b in itertools.pairwise(ends) for i in range(b - a)])
    return torch.tensor(rows, device="cuda")


def leaves(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k and v as in a model: transposed views of projections."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for heads in (case.heads, case.kv_heads, case.kv_heads):
        shape = (case.rows, case.length, heads, case.size)
        x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        made.append(x.to(dtype).requires_grad_())
    return made


def contender(name: str, case: Case):
    """Return a function of q, k, v [B, H, T, D] that returns [B, T, H, D]."""
    documents = documents_of(positions(case))
    groups = case.heads // case.kv_heads
    if name == "ours":
        return lambda q, k, v: packed_attention(q, k, v, documents, window=case.window)
    if name == "causal":
        return lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=groups > 1
        ).transpose(1, 2)
    mask = dense_mask(documents, case.rows, case.window)
    if name == "mask":

        def masked(q, k, v):
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous()

        return masked

    def seen(row, head, i, j):
        return mask[row, 0, i, j]

    blocks = create_block_mask(seen, case.rows, None, case.length, case.length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(
        q, k, v, block_mask=blocks, enable_gqa=groups > 1
    ).transpose(1, 2)  # fmt: skip


def run(function, tensors, seed=None):
    """Return output and gradients."""
    out = function(*(x.transpose(1, 2) for x in tensors))
    seed = torch.ones_like(out) if seed is None else seed
    return [out, *torch.autograd.grad(out, tensors, seed)]


def error(name: str, case: Case) -> float:
    """Return the largest relative error, on rows of at most 1024 tokens."""
    small = case._replace(rows=2, length=min(case.length, 1024))
    if small.window:
        small = small._replace(window=min(small.window, 200))
    shape = (small.rows, small.length, small.heads, small.size)
    seed = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    truth = run(contender("mask", small), leaves(small, torch.float32), seed)
    got = run(contender(name, small), leaves(small, torch.bfloat16), seed.bfloat16())
    return max(float((g.float() - t).norm() / t.norm()) for g, t in zip(got, truth, strict=True))


def cell(name: str, case: Case) -> str:
    try:
        if name != "causal" and not (wrong := error(name, case)) < TOLERANCE:
            return f"wrong by {wrong:.2g}"
        tensors, function = leaves(case, torch.bfloat16), contender(name, case)
        seed = torch.randn_like(run(function, tensors)[0])
        ms, mib = measure(lambda: run(function, tensors, seed), warmup=5, repeats=20)
    except Exception as failure:  # a peer's failure is its result
        return f"{type(failure).__name__}: {str(failure)[:60]}"
    return f"{ms:.2f} ({mib:.0f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", help="also write the cells to this file")
    options = parser.parse_args()
    rows = []
    for name in chosen_cases(CASES, options.case):
        position_ids = positions(CASES[name])
        bounds = measure(lambda ids=position_ids: documents_of(ids))[0]
        cells = [cell(contender_, CASES[name]) for contender_ in options.contender]
        rows.append([name, *cells, f"{bounds:.2f}"])
        print(rows[-1], flush=True)
    columns = ["case", *options.contender, "bounds"]
    print(environment())
    print_table("Attention of packed rows, forward and backward, ms (MiB)", columns, rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([dict(zip(columns, row, strict=True)) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
