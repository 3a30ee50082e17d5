"""Communication and computation of a GPU in one optimizer step, by formula.

A ring all-gather or reduce-scatter of B bytes over N GPUs sends B (N - 1) / N from each, an
all-reduce twice that. Pure arithmetic; `docs/planning.md` derives it.
"""

from __future__ import annotations

from liger_trainer.runs.planning.memory import Run


def traffic(run: Run) -> dict[str, float]:
    """Return the bytes that each GPU sends in one optimizer step; it receives as many.

    DDP and FSDP2 reduce once per step unless `reduce_each`, DeepSpeed after every micro-batch.
    Weights gathered in forward are gathered again in backward, except FSDP2's last unit, the head.
    """
    w, c, n = run.weights, run.compute, run.gpus
    part, micro = (n - 1) / n, run.accumulation
    d_head = w.head * w.head_trained
    once = run.engine in ("ddp", "fsdp2") and not run.reduce_each
    times = 1 if once else micro
    if run.engine == "ddp":
        each = w.trained_bytes / max(1, w.trained)
        return {
            "all-reduce of gradients": 2 * part * each * (w.trained - d_head) * times,
            "all-reduce of the head's gradient": 2 * part * each * d_head * times,
        }
    if run.sharded:
        everything = (w.trained + w.frozen) * (2 if run.reference_bytes else 1)
        again = w.trained + w.frozen - (w.head if run.engine == "fsdp2" else 0)
        gathered = {
            "all-gather of weights, forward": part * c * everything * micro,
            "all-gather of weights, backward": part * c * again * micro,
        }
    else:
        gathered = {"all-gather of updated weights": part * c * w.trained}
    return gathered | {
        "reduce-scatter of gradients": part * c * (w.trained - d_head) * times,
        "reduce-scatter of the head's gradient": part * c * d_head * times,
    }


def flops(run: Run) -> float:
    """Return the floating-point operations of one GPU in one optimizer step.

    Per weight and token: 2 in forward, 2 for the gradient of the input, 2 for the gradient of a
    trained weight, 2 for recomputation in a checkpointed layer. Causal attention: 2 T Q per token
    and layer in forward, twice that in backward. A reference model adds one forward.
    """
    s, w = run.shape, run.weights
    attention = 2 * run.length * s.query
    layers = w.layer * s.layers
    forward = 2 * (layers + w.head) + attention * s.layers
    trained = w.layer_trained * s.layers + w.head * w.head_trained
    backward = 2 * (layers + w.head + trained) + 2 * attention * s.layers
    again = (2 * layers + attention * s.layers) if run.checkpointing else 0
    reference = forward if run.reference_bytes else 0
    return (forward + backward + again + reference) * run.tokens * run.accumulation
