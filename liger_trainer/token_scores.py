"""Scores of labels under logits, and divergences of them, that may be deferred: never built then.

The last part teaches deferred logits the expressions that user code scores tokens with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from liger_trainer.deferred import Deferred
from liger_trainer.head_state import HeadState, summarise
from liger_trainer.kernels.jensen_shannon import DivergenceOptions
from liger_trainer.kernels.linear_divergence import linear_divergence
from liger_trainer.kernels.linear_log_probs import linear_log_probs
from liger_trainer.kernels.log_probs import log_probs
from liger_trainer.kernels.scores import ScoreOptions, TokenScores
from liger_trainer.logits import DeferredLogits, answers, defer


def token_scores(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    weighting: str | None = None,
) -> TokenScores:
    """Scores of `labels` [...] under `logits` [..., V]; label -100 marks tokens without any.

    Deferred logits go through `linear_log_probs` with whatever scale and softcap the model applied
    to them; `weighting` is explained there. Other logits go through `log_probs`.
    """
    head = fusable(logits)
    if head is None:
        if isinstance(logits, Deferred):
            logits = logits.materialise()
        options = ScoreOptions(temperature=temperature)
        return log_probs(logits, labels, outputs=outputs, options=options)
    head.check_versions()
    scale, softcap = summarise(head.ops)
    if head.dtype == torch.float16:
        weighting = None  # the loss scale must reach the logits' gradient before it is rounded
    with torch.autocast(logits.device.type, enabled=False):
        return linear_log_probs(
            [term.hidden.to(head.dtype) for term in head.terms],
            [term.weight for term in head.terms],
            labels,
            head.bias,
            outputs=outputs,
            options=ScoreOptions(scale=scale, softcap=softcap, temperature=temperature),
            weighting=weighting,
        )


def fusable(logits: torch.Tensor) -> HeadState | None:
    """What deferred logits are made of, if a kernel can take it from there; else None."""
    state = logits.state if isinstance(logits, DeferredLogits) else None
    if state is None or not state.fused or summarise(state.ops) is None:
        return None
    return None if any(name == "log_softmax" for name, _ in state.ops) else state


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised Jensen-Shannon divergence of deferred logits, over the tokens of `mask`, and the
    student's entropy of each token; both `student` and `teacher` must be `fusable`."""
    heads = [fusable(student), fusable(teacher)]
    (scale, softcap), (teacher_scale, teacher_softcap) = (summarise(head.ops) for head in heads)
    for head in heads:
        head.check_versions()
    hidden, teacher_hidden = ([term.hidden.to(head.dtype) for term in head.terms] for head in heads)
    weight, teacher_weight = ([term.weight for term in head.terms] for head in heads)
    with torch.autocast(student.device.type, enabled=False):
        return linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, mask, heads[0].bias, heads[1].bias,
            options=DivergenceOptions(
                float(beta), float(temperature), scale, softcap, teacher_scale, teacher_softcap
            ),
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
        )  # fmt: skip


# --- what deferred logits answer themselves ---------------------------------------------------


@answers(torch.gather, torch.Tensor.gather, torch.take_along_dim, torch.Tensor.take_along_dim)
def _gather(logits, *args, **kwargs):
    """log_softmax(logits).gather(-1, labels): the labels' log-probabilities."""
    given = dict(enumerate(args)) | kwargs
    index = next((x for x in given.values() if isinstance(x, torch.Tensor)), None)
    dim = next((x for x in given.values() if isinstance(x, int)), None)
    state = logits.state if isinstance(logits, DeferredLogits) else None
    if state is None or index is None or dim is None or len(given) != 2:
        return NotImplemented
    fits = dim % logits.ndim == logits.ndim - 1 and index.shape == (*logits.shape[:-1], 1)
    names = [name for name, _ in state.ops]
    if not fits or "log_softmax" not in names or index.dtype != torch.int64:
        return NotImplemented
    before = dataclasses.replace(state, ops=state.ops[: names.index("log_softmax")])
    if not state.fused or summarise(before.ops) is None:
        return NotImplemented
    scores = token_scores(defer(before), index.squeeze(-1))
    return scores.log_probs.unsqueeze(-1).to(logits.dtype)


@answers(torch.mean, torch.Tensor.mean)
def _mean(logits, *args, **kwargs):
    """The mean of all logits, as a number to report: no logits, where the head is linear."""
    state = fusable(logits)
    if state is None or args or kwargs or logits.requires_grad or not logits.numel():
        return NotImplemented
    scale, softcap = summarise(state.ops)
    if softcap is not None:
        return NotImplemented
    state.check_versions()
    total = sum(
        torch.dot(
            term.hidden.float().reshape(-1, term.hidden.shape[-1]).mean(0),
            term.weight.float().mean(0),
        )
        for term in state.terms
    )
    if state.bias is not None:
        total = total + state.bias.float().mean()
    return (total * scale).to(logits.dtype)
