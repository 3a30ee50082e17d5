"""Log-probabilities of labels from hidden states and head weight, without holding all logits.

    logits = sum_t hidden_t @ weight_t^T + bias          scores = what `scores.py` defines

for N tokens, hidden size H, vocabulary V; one term for a plain head, a second one for a low-rank
adapter on it. The result is an ordinary differentiable tensor that any loss can be computed from.

Cost, in GEMMs of 2 N H V FLOP with N the number of tokens that have a label:

    without gradient                                                            1
    the logits fit the workspace, which is kept until backward                  3  (frozen head: 2)
    else                               3 plus the share that did not fit, below 4  (frozen head: 3)
    with `weighting`, whatever fits                                             3  (frozen head: 2)

`weighting` declares the gradient g_n of log_probs in advance: "uniform" (the same for all
tokens: negative log-likelihood) or "probability" (proportional to the token's probability:
dynamic fine-tuning, arXiv:2508.05629). All three GEMMs are then finished in forward. If the actual
gradient differs from the declared one, or a gradient arrives at another output, all gradients but
those of ignored tokens become NaN.
In fp16 the gradient of the logits is then computed before a loss scale is applied, so use bf16.

A loss whose formula is known up front needs no declaration: see `log_prob_loss.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..autograd import first_derivative_only
from ..logits.reduction import check_labels
from ..logits.scores import (
    Normalizer,
    ScoreGradients,
    ScoreOptions,
    TokenScores,
    check_outputs,
    log_probs_reference,
)
from ..runtime import on_device
from . import scoring
from .head import LinearHead, Plan
from .scoring import Scoring
from .supervised import Tokens
from .sweep import scale_gradients
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
    """Return the scores of each token [N], from all logits at once."""
    logits_NV = LinearHead(hidden, weight, bias_V).logits()
    return log_probs_reference(logits_NV, labels_N, options, outputs)


# --- the declared gradient -------------------------------------------------------------------


def _declared(log_probs_N: torch.Tensor, weighting: str) -> torch.Tensor:
    """Return the declared gradient of log_probs, up to a factor; not valid for ignored tokens."""
    return torch.ones_like(log_probs_N) if weighting == "uniform" else log_probs_N.exp()


def _factor(g_N: torch.Tensor, declared_N: torch.Tensor) -> torch.Tensor:
    """Return c such that g = c * declared, or NaN if there is no such c."""
    g_N, declared_N = g_N.double(), declared_N.double()
    factor = torch.dot(g_N, declared_N) / declared_N.square().sum().clamp_min(1e-300)
    error = torch.linalg.vector_norm(g_N - factor * declared_N)
    matches = error <= 1e-5 * torch.linalg.vector_norm(g_N)
    return factor.where(matches, float("nan"))


# --- autograd --------------------------------------------------------------------------------


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, options, outputs, weighting, shard, labels, *operands):
        head = LinearHead.unflatten(operands, shard)
        ctx.plan, ctx.options, ctx.shard, ctx.weighting = plan, options, shard, weighting
        ctx.saved_logits, grads = None, ()
        with on_device(labels):
            tokens = Tokens.of(labels, head.vocab, options.ignore_index, plan.first)
            sweep = Scoring.start(head, tokens, plan, options, outputs)
            scores = sweep.scores
            if weighting and plan.want_grad:
                scoring.forward_with_gradient(
                    sweep,
                    lambda: _even_ends(tokens.supervised(), plan),
                    lambda scores, *_: ScoreGradients(_declared(scores.log_probs, weighting)),
                )
                grads = sweep.flat_gradients()
            else:
                ctx.saved_logits = scoring.forward(sweep)
        ctx.host = tokens.host
        ctx.save_for_backward(
            labels, tokens.order, scores.log_probs, scores.entropy, *sweep.normalizer,
            *operands, *grads,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*scores.constants)
        return tuple(scores)

    @staticmethod
    @first_derivative_only
    def backward(ctx, g_log_probs, g_entropy, g_lse, *_):
        labels, order, log_probs, entropy, top, log_total, *rest = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 6
        head, known_grads = LinearHead.unflatten(rest[:count], ctx.shard), rest[count:]
        tokens = Tokens(labels, order, ctx.host, head.vocab)
        if g_log_probs is None:
            g_log_probs = torch.zeros_like(log_probs)
        with on_device(labels):
            if known_grads:
                tokens.check()
                supervised_N = labels != ctx.options.ignore_index
                both = (g_log_probs, _declared(log_probs, ctx.weighting))
                factor = _factor(*(x.where(supervised_N, 0.0) for x in both))
                if g_entropy is not None or g_lse is not None:
                    factor = factor * float("nan")
                factor = factor.to(log_probs.dtype)
                grads = scale_gradients(known_grads, factor, supervised_N, head.dtypes)
            else:
                scores, normalizer = TokenScores(log_probs, entropy), Normalizer(top, log_total)
                given = (None if g is None else g.contiguous() for g in (g_entropy, g_lse))
                saved_logits, ctx.saved_logits = ctx.saved_logits, None
                grads = scoring.backward(
                    Scoring(head, tokens, ctx.plan, ctx.options, scores, normalizer),
                    ScoreGradients(g_log_probs.contiguous(), *given), saved_logits,
                )  # fmt: skip
        return *[None] * 6, *ctx.plan.gradients(*grads)


def _even_ends(total: int, plan: Plan) -> list[int]:
    """Return the ends of groups that fill the workspace: any groups serve a per-token gradient."""
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
    """Return the scores (log-probabilities, ...) of `hidden @ weight.T + bias` with `labels`.

    The module's docstring states the cost in GEMMs and memory.

    Args:
        hidden: [..., H], or a sequence of such, one for each term of the head. fp32, bf16 or fp16;
            the GEMMs run in the dtype of the first.
        weight: [V, H], or a sequence of such; its gradient has its own dtype.
        labels: [...], int64; `options.ignore_index` marks tokens without a label, which cost
            nothing.
        bias: [V].
        outputs: further fields of `TokenScores`, see `scores.EXTRA`.
        weighting: None, or the gradient of log_probs, declared in advance: "uniform" or
            "probability" (see the module's docstring).
        max_rows: rows of logits held at once; default `workspace_rows`.
        shard: as in `linear_cross_entropy`.

    Returns `TokenScores` in fp32, each field of the shape of `labels`. Gradients flow from
    log_probs, entropy and log_sum_exp to hidden, weight and bias. torch.compile breaks the graph
    here.

    Raises ValueError for an unknown output or weighting, if operands do not fit, and for labels
    outside [0, V): at once where the host reads the token count, else in backward; their
    log-probability is NaN until then.
    """
    head = LinearHead.checked(hidden, weight, bias, shard)
    outputs = check_outputs(outputs)
    if weighting not in (None, *WEIGHTINGS):
        raise ValueError(f"weighting must be None or one of {WEIGHTINGS}, got {weighting!r}")
    check_labels(labels, head.tokens, head.device)
    labels_N = labels.reshape(-1).contiguous()
    plan = head.plan(labels_N.shape[0], weighting is not None, max_rows)
    scores = _LinearLogProbs.apply(
        plan, options, outputs, weighting, shard, labels_N, *head.flatten()
    )
    return TokenScores(*scores).reshape(labels.shape)
