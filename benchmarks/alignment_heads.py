"""Heads and losses of alignment training against their peers: python benchmarks/alignment_heads.py

Forward and backward, bf16, milliseconds (peak MiB beyond inputs; beyond inputs and gradients),
H 4096, V 128256. Where a loss has a reference model, its pass is in the time of everybody.

    floor     the matrix products alone, over the supervised tokens: three for the policy, one for
              the reference or the teacher
    grouped   `linear_log_prob_loss` with the package's formula, `linear_divergence` to one number
    generic   `linear_log_probs` and the formula outside, the divergence one number per token
    eager     all logits at once, the formula in plain torch
    TRL       its chunked log-probabilities and the formula in plain torch; its chunked divergence
    liger     the module of `liger_kernel.chunked_loss`, with torch.compile as by default

The first half of every sequence is the prompt. ORPO's negative log-likelihood covers prompt and
completion of the chosen, so that three quarters of its tokens are supervised. KTO is given the KL
estimate, and the pass that makes it is left out. GRPO's completions are on policy; eager and liger
project completions only there, as the trainers do that call them, and whole sequences elsewhere.
JSD distils a teacher of H 4096 into a student of H 2048, over 4096 tokens.

Before it is timed a contender's loss and gradients are compared with those of the first one; what
computes something else is not timed. `--smoke` runs tiny sizes in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from alignment_cases import CASES, Sizes
from timing import add_case_option, chosen_cases, environment, measure, print_table

CONTENDERS = ("floor", "grouped", "generic", "eager", "TRL", "liger")
PEERS = ("TRL", "liger")
ANOTHER = "another result"
FULL = Sizes(8, 2048, 4096, 128256, "cuda", torch.bfloat16)
SMOKE = Sizes(8, 16, 32, 300, "cpu", torch.float32)


class Result(NamedTuple):
    """The loss, d hidden, and about a thousand rows of d weight."""

    loss: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor

    def differences(self, other: Result) -> list[float]:
        pairs = zip(self, other, strict=True)
        return [((a - b).norm() / b.norm()).item() for a, b in pairs]


class Outcome(NamedTuple):
    cell: str
    difference: str = ""
    result: Result | None = None


def release() -> None:
    """Free memory and compiled code, so that no contender benefits from another's."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clear(case) -> None:
    case.hidden.grad = case.weight.grad = None


def result(case, loss_of: Callable) -> Result:
    clear(case)
    loss = loss_of()
    loss.backward()
    stride = max(1, len(case.weight) // 1000)
    values = (loss.detach(), case.hidden.grad, case.weight.grad[::stride])
    return Result(*(x.cpu().float() for x in values))


def milliseconds_and_peaks(case, step: Callable) -> str:
    clear(case)
    if case.hidden.is_cuda:
        inputs = torch.cuda.memory_allocated()
        ms, beyond_gradients = measure(step, warmup=2, repeats=8)
        beyond_inputs = (torch.cuda.max_memory_allocated() - inputs) / 2**20
        return f"{ms:.1f} ({beyond_inputs:.0f}; {beyond_gradients:.0f})"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return f"{1000 * statistics.median(times):.1f}"


def compete(case, name: str, truth: Result | None) -> Outcome:
    """Compare the contender `name` with `truth`, and measure it."""
    contend = getattr(case, name.lower())()
    if name == "floor":
        return Outcome(milliseconds_and_peaks(case, contend).split(" (")[0])
    found = result(case, contend)
    difference = "compared with"
    if truth is not None:
        relative = found.differences(truth)
        difference = ", ".join(f"{x:.1e}" for x in relative)
        tolerance = 1e-4 if case.hidden.dtype == torch.float32 else case.bf16_tolerance
        if not all(x <= tolerance for x in relative):
            return Outcome(ANOTHER, difference)

    def step():
        clear(case)
        contend().backward()

    return Outcome(milliseconds_and_peaks(case, step), difference, found)


def attempt(case, name: str, truth: Result | None) -> Outcome:
    """Run `compete`; running out of memory and a peer's failure are results, too."""
    try:
        return compete(case, name, truth)
    except torch.OutOfMemoryError:
        return Outcome("out of memory")
    except Exception as error:
        if name not in PEERS:
            raise
        if isinstance(error, ImportError):
            return Outcome(f"skipped: {error}")
        traceback.print_exc()
        return Outcome(type(error).__name__)


def run(name: str, sizes: Sizes, contenders: list[str]) -> tuple[list[str], list[str]]:
    """Return the rows of the two tables."""
    torch.manual_seed(0)
    case, truth = CASES[name](sizes), None
    outcomes = []
    for contender in contenders:
        release()
        outcomes.append(attempt(case, contender, truth))
        truth = truth or outcomes[-1].result
    row = [case.describe(), *(o.cell for o in outcomes)]
    return row, [name, *(o.difference for o in outcomes)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_option(parser)
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("needs a CUDA device; --smoke runs without one")
    times, differences = [], []
    for name in chosen_cases(CASES, options.case):
        release()
        row, difference = run(name, SMOKE if options.smoke else FULL, options.contender)
        times.append(row)
        differences.append(difference)
        print(row, flush=True)
    print(environment())
    columns = ["case", *options.contender]
    print_table("Alignment heads, ms (peak MiB beyond inputs; and gradients)", columns, times)
    print_table("Relative differences of loss, d hidden, d weight", columns, differences)
    if options.smoke and any(ANOTHER in row for row in times):
        raise SystemExit("a contender computes something else")


if __name__ == "__main__":
    main()
