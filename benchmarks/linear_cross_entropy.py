"""Linear head and cross entropy against its peers: python benchmarks/linear_cross_entropy.py

Forward and backward, bf16, milliseconds (peak MiB beyond inputs and gradients). `floor` is the
three matrix products alone, over the supervised tokens. A peer that is not installed is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import environment, measure, print_table

from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy

CASES = [  # tokens, hidden size, vocabulary, fraction of labels ignored
    (8192, 4096, 128256, 0.0),
    (16384, 4096, 128256, 0.6),
    (16384, 2048, 151936, 0.0),
    (8192, 2304, 256000, 0.0),
    (512, 2048, 128256, 0.0),
]


def floor(hidden, weight, labels):
    supervised = int((labels != -100).sum())
    x = hidden.detach()[:supervised].contiguous()
    w = weight.detach()
    logits = x @ w.t()
    logits @ w
    logits.t() @ x


def eager(hidden, weight, labels):
    F.cross_entropy((hidden @ weight.t()).float(), labels).backward()


def ours(hidden, weight, labels):
    linear_cross_entropy(hidden, weight, labels).backward()


def peers():
    found = {"torch eager": eager, "torch.compile": torch.compile(eager_loss)}
    found["torch.compile"] = compiled(found["torch.compile"])
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["liger"] = lambda h, w, y: liger(h, w, y).backward()
        found["liger fp32 acc"] = lambda h, w, y: liger(
            h, w, y, accum_dtype=torch.float32
        ).backward()
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cut-cross-entropy"] = lambda h, w, y: cce(h, w, y).backward()
    except ImportError:
        pass
    return found


def eager_loss(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def compiled(loss):
    return lambda h, w, y: loss(h, w, y).backward()


def main():
    rows = []
    contenders = {"floor": floor, "liger_trainer": ours, **peers()}
    for tokens, width, vocab, ignored in CASES:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) * 0.02
        weight.requires_grad_()
        labels = torch.randint(0, vocab, (tokens,), device="cuda")
        labels[torch.rand(tokens, device="cuda") < ignored] = -100
        row = [f"N{tokens} H{width} V{vocab}, {ignored:.0%} ignored"]
        for fn in contenders.values():

            def step(fn=fn, hidden=hidden, weight=weight, labels=labels):
                hidden.grad = weight.grad = None
                fn(hidden, weight, labels)

            try:
                ms, peak = measure(step)
                row.append(f"{ms:.2f} ({peak:.0f})")
            except Exception as error:  # a peer's failure is its result
                row.append(type(error).__name__)
            torch.cuda.empty_cache()
        rows.append(row)
    print(environment())
    print_table("Linear + cross entropy, ms (peak MiB)", ["case", *contenders], rows)


if __name__ == "__main__":
    main()
