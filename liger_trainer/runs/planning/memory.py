"""Memory of a training step on one GPU, by formula. Pure arithmetic; `docs/planning.md` derives it.

The peak is the largest of four moments: the loss (all activations, the head's workspace), the
backward of the last layer (all activations, its temporaries), the backward of the first layer
(nearly all gradients, its temporaries), and the optimizer's step (all gradients). With gradient
accumulation, the gradients of earlier micro-batches exist throughout the step.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# Defaults of DeepSpeed, in elements: stage3_max_live_parameters and reduce_bucket_size.
_LIVE, _BUCKET = 10**9, 5 * 10**8


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder with a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    query: int  # heads times head size
    key_value: int
    heads: int
    vocab: int
    extra_norms: int = 0  # per layer, of width `hidden`, besides those before attention and MLP
    head_norms: bool = False  # norms of queries and keys


@dataclass(frozen=True)
class Weights:
    """Counts of parameters, in elements unless the name says bytes."""

    trained: int
    frozen: int
    trained_bytes: int  # in their own dtypes
    frozen_bytes: int
    layer: int  # one decoder layer
    layer_trained: int
    matrices_trained: int  # in all linear layers, whose weights autocast casts
    head: int  # vocabulary times hidden
    head_trained: bool
    head_dtype_bytes: int
    ranks: int = 0  # sum of the adapters' ranks over the linear layers of a decoder layer


@dataclass(frozen=True)
class Run:
    """A training step. `tokens` is the size of a micro-batch on one GPU; bytes are per element."""

    shape: Shape
    weights: Weights
    tokens: int
    length: int  # of a sequence
    batch: int = 1  # examples in a micro-batch
    accumulation: int = 1
    reduce_each: bool = False  # gradients are reduced after every micro-batch
    compute: int = 2  # bytes of GEMM operands
    mixed: bool = False  # autocast, or an engine's policy, narrows weights to `compute`
    lean: bool = True  # activation_memory
    checkpointing: bool = False
    optimizer: float | None = None  # bytes per trained element; None: twice its weight's
    reference_bytes: int = 0  # weights of a frozen reference model
    engine: str = "ddp"
    gpus: int = 1
    memory: float = 80.0  # GiB of a GPU

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded, and gathered for use."""
        return self.engine in ("fsdp2", "zero3")

    @property
    def master(self) -> float:
        """Bytes per trained weight in the optimizer's copy."""
        upcast = self.engine.startswith("zero") or (self.engine == "fsdp2" and self.mixed)
        return 4 if upcast else self.weights.trained_bytes / max(1, self.weights.trained)

    @property
    def residual(self) -> int:
        """Bytes per element of the residual stream, which has the embedding's output dtype."""
        narrowed = self.engine != "ddp" or not self.mixed
        return self.compute if narrowed else max(self.compute, self.weights.head_dtype_bytes)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def kept_per_token(run: Run, *, lean: bool) -> dict[str, int]:
    """Return the bytes per token that one layer saves for backward.

    Norms save their inputs, which are the residuals. The gated product saves gate and up. Attention
    saves q, k, v, its output and the log-sum-exp of each head. LoRA saves s x Aᵀ. Unless `lean`,
    linear layers also save norm outputs and gated products.
    """
    s, c = run.shape, run.compute
    adapter = 4 if run.weights.ranks and not run.mixed else c
    kept = {
        "residuals": 2 * s.hidden * run.residual + s.extra_norms * s.hidden * c,
        "gate and up": 2 * s.intermediate * c,
        "q, k, v": (s.query + 2 * s.key_value) * c,
        "q, k before their norms": (s.query + s.key_value) * c * s.head_norms,
        "attention output": s.query * c,
        "adapters": run.weights.ranks * adapter,
        "statistics": 4 * (s.heads + 2 + s.extra_norms),
    }
    if not lean:
        # autocast copies an fp32 output for each of q, k, v, gate and up.
        copies = 5 if run.residual > c else 2
        kept["norm outputs"] = copies * s.hidden * c
        kept["gated product"] = s.intermediate * c
    return kept


def states(run: Run) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer states on one GPU."""
    w, n = run.weights, run.gpus
    trained = w.trained * run.master
    optimizer = 2 * trained if run.optimizer is None else w.trained * run.optimizer
    if run.engine == "ddp":
        found: dict[str, float] = {
            "weights": w.trained_bytes + w.frozen_bytes + run.reference_bytes,
            "gradients": w.trained_bytes,
            "optimizer": optimizer,
        }
        # DDP reduces flat copies of the gradients.
        return found | ({"gradient buckets": w.trained_bytes} if n > 1 else {})
    if run.engine == "fsdp2":
        weights = (trained + w.frozen_bytes + run.reference_bytes) / n
        return {"weights": weights, "gradients": trained / n, "optimizer": optimizer / n}
    narrow = 2 * (w.trained + w.frozen) + run.reference_bytes
    return {
        "weights": narrow / (n if run.engine == "zero3" else 1) + trained / n,
        "gradients": 2 * w.trained / n,
        "optimizer": optimizer / n,
    }


def head_memory(run: Run) -> tuple[float, float]:
    """Return the bytes of the head's logits, and of the buffer for its weight's gradient.

    Computed as in the kernels: over more than two workspaces, that gradient is summed in fp32.
    """
    from liger_trainer.kernels.linear.workspace import rows_on, workspace  # imports torch

    s, trained = run.shape, run.weights.head_trained
    most = rows_on(int(run.memory * GIB), run.tokens, s.vocab, s.hidden * trained, run.compute)
    narrow = run.compute if run.sharded else run.weights.head_dtype_bytes
    width = narrow if run.tokens <= 2 * most else 4
    logits = workspace(run.tokens, most) * s.vocab * run.compute
    return logits, width * s.vocab * s.hidden * trained


def peak(run: Run) -> Memory:
    """Return the moment of the step with the most memory in use, and its parts."""
    s, w, c = run.shape, run.weights, run.compute
    fixed = states(run)
    gradients = fixed.pop("gradients")
    lean = run.lean and not run.checkpointing  # a checkpointed layer saves all when recomputed
    layer = run.tokens * sum(kept_per_token(run, lean=lean).values())
    all_layers = layer * s.layers
    if run.checkpointing:
        all_layers = s.layers * s.hidden * run.residual * run.tokens
    casts = 0
    if run.engine == "ddp" and run.mixed and not w.ranks:  # LoRA's operation keeps no casts
        casts = c * w.matrices_trained if w.head_dtype_bytes > c else 0
    if run.sharded:
        units = w.head + 2 * w.layer
        live = units if run.engine == "fsdp2" else min(_LIVE, w.trained + w.frozen)
        fixed["gathered weights"] = c * live
    # A layer's gradients before and during reduction.
    unreduced = {
        "ddp": 0,
        "fsdp2": 2 * c * w.layer_trained,
        "zero2": 2 * c * min(_BUCKET, w.trained),
        "zero3": 2 * c * min(_BUCKET, w.trained),
    }[run.engine]
    # Accelerate's `no_sync` keeps FSDP2's gradients whole until the last micro-batch.
    whole = c * w.trained if run.engine == "fsdp2" and not run.reduce_each else gradients
    earlier = whole if run.accumulation > 1 else 0
    logits, d_weight = head_memory(run)
    rest = run.tokens * s.hidden * (run.residual + 2 * c)  # final norm in and out, d hidden
    again = layer if run.checkpointing else 0
    # d gated, d gate, d up; the gated product, if it was saved, has been freed by then.
    temporary = again + run.tokens * c * ((3 if lean else 2) * s.intermediate + 2 * s.hidden)
    # In the first layer's backward, its own gradients and the embedding's do not exist yet.
    most = (s.layers - 1) * w.layer_trained + w.head * w.head_trained
    moments = {
        "the loss": (earlier, casts, all_layers, logits + d_weight + rest, 0),
        "backward of the last layer": (
            earlier,
            casts * (not run.checkpointing),  # with checkpointing, freed after forward
            all_layers,
            d_weight + rest,
            temporary + unreduced,
        ),
        "backward of the first layer": (
            max(earlier, gradients * most / max(1, w.trained)),
            0,
            run.tokens * s.hidden * run.residual if run.checkpointing else layer,
            0,
            temporary + unreduced,
        ),
        "the optimizer's step": (gradients, 0, 0, 0, 0),
    }
    names = ("gradients", "weights cast by autocast", "activations", "head and loss",
             "backward of a layer")  # fmt: skip
    found = [
        Memory(m, fixed | dict(zip(names, parts, strict=True))) for m, parts in moments.items()
    ]
    return max(found, key=lambda memory: memory.total)


def usable(memory: float) -> float:
    """Return the bytes that tensors can take on a GPU of `memory` GiB.

    Excluded are 1 GiB for the CUDA context and NCCL, and 4% that the allocator cannot fill.
    """
    return (0.96 * memory - 1) * GIB
