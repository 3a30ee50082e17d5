"""Log-probabilities of labels from hidden states and head weight, without holding all logits.

    logits = sum_t hidden_t @ weight_t^T + bias          scores = what `scores.py` defines

for N tokens, hidden size H, vocabulary V; one term for a plain head, a second one for a low-rank
adapter on it. The result is an ordinary differentiable tensor: any loss may be made of it.

Cost, in GEMMs of 2 N H V FLOP with N the number of tokens that have a label:

    without gradient                                                            1
    the logits fit the workspace, which is kept until backward                  3  (frozen head: 2)
    else                               3 plus the share that did not fit, below 4  (frozen head: 3)
    with `weighting`, whatever fits                                             3  (frozen head: 2)

`weighting` declares the gradient g_n of log_probs in advance: "uniform" (the same for all
tokens: negative log-likelihood) or "probability" (proportional to the token's probability:
dynamic fine-tuning, arXiv:2508.05629). All three GEMMs are then finished in forward. A gradient
that breaks the promise turns all gradients but those of ignored tokens into NaN, as does one that
arrives at another output.
In fp16 the gradient of the logits is then formed before a loss scale reaches it: use bf16.

A loss whose formula is known up front needs no promise: `linear_log_prob_loss.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..autograd import first_derivative_only
from ..logits.reduction import check_labels, masked_scale, scale_rows
from ..logits.scores import (
    DIFFERENTIABLE,
    ScoreGradients,
    ScoreOptions,
    TokenScores,
    check_outputs,
    log_probs_reference,
)
from ..runtime import on_device
from . import scoring
from .head import Plan
from .operands import checked_operands, classes, make_head, make_plan
from .supervised import HostStats, partition
from .vocab_parallel import VocabShard

WEIGHTINGS = ("uniform", "probability")

# --- torch reference -------------------------------------------------------------------------


def linear_log_probs_reference(
    hidden: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    options: ScoreOptions = ScoreOptions(),
    outputs: Sequence[str] = (),
) -> TokenScores:
    """Scores per token [N], from all logits at once."""
    logits_NV = sum(h @ w.to(h.dtype).t() for h, w in zip(hidden, weight, strict=True))
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    return log_probs_reference(logits_NV, labels_N, options, outputs)


# --- the promised gradient -------------------------------------------------------------------


def _promised(log_probs_N: torch.Tensor, weighting: str) -> torch.Tensor:
    """Return the promised gradient of log_probs, up to a factor; ignored tokens are excluded."""
    return torch.ones_like(log_probs_N) if weighting == "uniform" else log_probs_N.exp()


def _factor(g_N: torch.Tensor, promised_N: torch.Tensor) -> torch.Tensor:
    """c of g = c * promised; NaN where that does not hold."""
    g_N, promised_N = g_N.double(), promised_N.double()
    factor = torch.dot(g_N, promised_N) / promised_N.square().sum().clamp_min(1e-300)
    error = torch.linalg.vector_norm(g_N - factor * promised_N)
    kept = error <= 1e-5 * torch.linalg.vector_norm(g_N)
    return factor.where(kept, float("nan"))


def scale_grads(finished, factor: torch.Tensor, supervised_N, dtypes: Sequence[torch.dtype]):
    """(d hidden, d weight, d bias) of a sweep, times `factor`; d weight in `dtypes`.

    Ignored rows stay exactly 0, whatever `factor` is.
    """
    terms = len(dtypes)
    rows = masked_scale(factor, supervised_N)
    total = masked_scale(factor, supervised_N.any())
    dhidden = [scale_rows(d, rows) if d.numel() else d for d in finished[:terms]]
    dweight = [
        torch.mul(d, total, out=torch.empty_like(d, dtype=dtype))
        for d, dtype in zip(finished[terms:-1], dtypes, strict=True)
    ]
    return dhidden, dweight, finished[-1] * total


# --- autograd --------------------------------------------------------------------------------


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, options, outputs, weighting, terms, shard, bias, labels, *operands):
        hidden, weight = operands[:terms], operands[terms:]
        ctx.plan, ctx.options, ctx.terms, ctx.weighting = plan, options, terms, weighting
        ctx.shard = shard
        ctx.dtypes = [w.dtype for w in weight]
        ctx.kept = None
        with on_device(labels):
            vocab, n = classes(weight, shard), labels.shape[0]
            order, stats = partition(labels, vocab, options.ignore_index, n > plan.first)
            ctx.host = HostStats(stats)
            head = make_head(hidden, weight, bias, labels, options, order, ctx.host, shard=shard)
            finished = []
            if weighting and plan.want_grad:
                swept = scoring.forward_with_gradient(
                    head, plan, outputs, ctx.dtypes,
                    lambda: _even_ends(head.supervised(), plan),
                    lambda scores, *_: ScoreGradients(_promised(scores.log_probs, weighting)),
                )  # fmt: skip
                scores = swept.scores
                finished = [*swept.dhidden, *swept.gradient.weight, swept.gradient.bias]
            else:
                scores, ctx.kept = scoring.forward(head, plan, outputs)
        ctx.save_for_backward(
            bias, labels, order, scores.log_probs, scores.entropy, scores.log_sum_exp,
            *operands, *finished,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        fields = scores._asdict().items()
        ctx.mark_non_differentiable(
            *(x for name, x in fields if x is not None and name not in DIFFERENTIABLE)
        )
        return tuple(scores)

    @staticmethod
    @first_derivative_only
    def backward(ctx, g_log_probs, g_entropy, g_lse, *_):
        bias, labels, order, log_probs, entropy, lse, *rest = ctx.saved_tensors
        plan, terms = ctx.plan, ctx.terms
        operands, finished = rest[: 2 * terms], rest[2 * terms :]
        if g_log_probs is None:
            g_log_probs = torch.zeros_like(log_probs)
        with on_device(labels):
            if finished:
                ctx.host.check(classes(operands[terms:], ctx.shard))
                supervised_N = labels != ctx.options.ignore_index
                both = (g_log_probs, _promised(log_probs, ctx.weighting))
                factor = _factor(*(x.where(supervised_N, 0.0) for x in both))
                if g_entropy is not None or g_lse is not None:
                    factor = factor * float("nan")
                dhidden, dweight, dbias = scale_grads(
                    finished, factor.to(log_probs.dtype), supervised_N, ctx.dtypes
                )
            else:
                head = make_head(
                    operands[:terms], operands[terms:], bias, labels, ctx.options, order, ctx.host,
                    shard=ctx.shard,
                )  # fmt: skip
                grads = (None if g is None else g.contiguous() for g in (g_entropy, g_lse))
                kept, ctx.kept = ctx.kept, None
                dhidden, dweight, dbias = scoring.backward(
                    head, plan, TokenScores(log_probs, entropy, lse),
                    ScoreGradients(g_log_probs.contiguous(), *grads), kept, ctx.dtypes,
                )  # fmt: skip
        return (
            *[None] * 6, dbias.to(bias.dtype) if plan.want_bias else None, None,
            *(d if want else None for d, want in zip(dhidden, plan.want_hidden, strict=True)),
            *(d if want else None for d, want in zip(dweight, plan.want_weight, strict=True)),
        )  # fmt: skip


def _even_ends(total: int, plan: Plan) -> list[int]:
    """Return arbitrary group boundaries: the gradient is per token."""
    rows = plan.workspace(total)
    return [*range(rows, total, rows), total] if total else []


# --- public ----------------------------------------------------------------------------------


@torch.compiler.disable(reason="the number of labeled tokens decides the shapes of the GEMMs")
def linear_log_probs(
    hidden: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    outputs: Sequence[str] = (),
    options: ScoreOptions = ScoreOptions(),
    weighting: str | None = None,
    max_rows: int | None = None,
    shard: VocabShard | None = None,
) -> TokenScores:
    """Scores of `hidden @ weight.T + bias` with `labels`; the module says at what cost.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such; its gradient has its own dtype.
        labels: [...], int64; `options.ignore_index` marks tokens without label and without cost.
        bias: [V].
        outputs: further fields of `TokenScores`, see `scores.EXTRA`.
        weighting: None, "uniform" or "probability", a promise about the gradient of log_probs.
        max_rows: rows of logits held at once; default `workspace_rows`.
        shard: as in `linear_cross_entropy`.

    Returns `TokenScores` in fp32, each field of the shape of `labels`. Gradients flow from
    log_probs, entropy and log_sum_exp to hidden, weight and bias. torch.compile breaks the graph
    here.

    Raises ValueError for an unknown output or weighting, for operands that do not fit, and for
    labels outside [0, V): at once where the host reads the token count, else in backward; their
    log-probability is NaN until then.
    """
    hidden, weight, bias = checked_operands(hidden, weight, bias, shard)
    outputs = check_outputs(outputs)
    if weighting not in (None, *WEIGHTINGS):
        raise ValueError(f"weighting must be None or one of {WEIGHTINGS}, got {weighting!r}")
    check_labels(labels, hidden[0].shape[:-1], hidden[0].device)
    labels_N = labels.reshape(-1).contiguous()
    hidden = [h.reshape(-1, h.shape[-1]) for h in hidden]
    plan = make_plan(hidden, weight, bias, labels_N, weighting is not None, max_rows, shard)
    scores = TokenScores(
        *_LinearLogProbs.apply(
            plan, options, outputs, weighting, len(hidden), shard, bias, labels_N, *hidden, *weight
        )
    )
    if "log_sum_exp" not in outputs:
        scores = scores._replace(log_sum_exp=None)
    return scores.map(lambda x: x.reshape(labels.shape))
