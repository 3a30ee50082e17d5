"""The losses that `alignment_heads.py` measures: inputs, and how every contender computes them.

A method named after a contender returns a function that computes the loss once. Peers are imported
in it, so that one which is not installed raises ImportError there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_trainer.kernels.linear.divergence import linear_divergence
from liger_trainer.kernels.linear.log_prob_loss import linear_log_prob_loss, pairs
from liger_trainer.kernels.linear.log_probs import linear_log_probs
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions
from liger_trainer.kernels.losses.dpo import DPOLoss
from liger_trainer.kernels.losses.grpo import GRPOLoss
from liger_trainer.kernels.losses.kto import KTOLoss
from liger_trainer.kernels.losses.reference_free import ORPOLoss
from liger_trainer.kernels.losses.sequences import sequence_log_probs, tokens_per_group


class Sizes(NamedTuple):
    batch: int
    length: int
    width: int
    vocab: int
    device: str
    dtype: torch.dtype


# --- log-probabilities, [B, T, H] to [B, T], 0 where there is no label ------------------------


def package_log_probs(hidden, weight, labels):
    return linear_log_probs(hidden, weight, labels).log_probs


def eager_log_probs(hidden, weight, labels):
    log_probs = (hidden @ weight.t()).float().log_softmax(-1)
    labeled = log_probs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return labeled.masked_fill(labels == -100, 0.0)


def trl_log_probs(hidden, weight, labels):
    """Compute log-probabilities as TRL's fused head does: of labeled tokens, in tiles of 4096 x
    32768."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = labels != -100
    scores, *_ = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ("log_probs",)
    )
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores)


def three_products(rows, weight):
    logits = rows @ weight.t()
    logits @ weight
    logits.t() @ rows


# --- cases: every method named after a contender returns a function that returns its loss -----


class Sequences:
    """A batch of B sequences of T tokens, for a policy and a reference that is close to it."""

    beta = 0.1
    has_reference = True
    reduction = "mean"
    bf16_tolerance = 0.02  # relative, of loss and gradients

    def __init__(self, sizes: Sizes):
        B, T, H, V, device, dtype = sizes
        normal = functools.partial(torch.randn, device=device, dtype=dtype)
        self.hidden = normal(B, T, H).requires_grad_()
        self.weight = normal(V, H).mul_(H**-0.5).requires_grad_()
        self.ids = torch.randint(V, (B, T), device=device)
        self.completion = torch.arange(T, device=device).expand(B, T) >= T // 2
        self.labels = self.ids.masked_fill(~self.completion, -100)
        self.desirable = torch.arange(B, device=device) % 2 == 0
        self.groups = torch.arange(B).unsqueeze(1)
        self.compiled = device == "cuda"
        if self.has_reference:
            with torch.no_grad():
                self.ref_hidden = self.hidden + 0.1 * normal(B, T, H)
                self.ref_weight = self.weight + 0.1 * H**-0.5 * normal(V, H)
        self.prepare()
        self.members = self.groups.to(device)

    def prepare(self):
        """Create the further inputs of a loss."""

    def describe(self) -> str:
        supervised = int((self.labels != -100).sum())
        B, T = self.labels.shape
        return f"{type(self).__name__}, {B} x {T}, {supervised} supervised"

    def group_loss(self, log_probs, mask, ref, groups):
        """Return losses [g] of some groups by the package's formula, from log_probs and mask [g, K,
        T]."""
        raise NotImplementedError

    def plain_loss(self, log_probs, ref, mask):
        """Return the loss of the batch in plain torch, from [B, T] tensors."""
        raise NotImplementedError

    def projected(self, x):
        """Return the positions of x [B, T, ...] that a trainer projects if its head takes no
        labels."""
        return x

    def reference(self, score, of=lambda x: x):
        if not self.has_reference:
            return None
        with torch.no_grad():
            return score(of(self.ref_hidden), self.ref_weight, of(self.labels))

    def plain(self, score, of=lambda x: x):
        ref = self.reference(score, of)
        log_probs = score(of(self.hidden), self.weight, of(self.labels))
        return self.plain_loss(log_probs, ref, of(self.completion))

    def floor(self):
        mask = self.labels != -100
        rows, weight = self.hidden.detach()[mask], self.weight.detach()
        ref = self.ref_hidden[mask] if self.has_reference else None

        def products():
            three_products(rows, weight)
            if ref is not None:
                ref @ self.ref_weight.t()

        return products

    def grouped(self):
        def loss():
            ref = self.reference(package_log_probs)
            return linear_log_prob_loss(
                self.hidden, self.weight, self.labels,
                lambda scores, mask, i: self.group_loss(scores.log_probs, mask, ref, i),
                groups=self.groups, reduction=self.reduction,
            )[0]  # fmt: skip

        return loss

    def generic(self):
        every = torch.arange(len(self.groups), device=self.labels.device)
        mask = (self.labels != -100)[self.members]

        def loss():
            ref = self.reference(package_log_probs)
            log_probs = package_log_probs(self.hidden, self.weight, self.labels)
            losses = self.group_loss(log_probs[self.members], mask, ref, every)
            return losses.mean() if self.reduction == "mean" else losses.sum()

        return loss

    def eager(self):
        return lambda: self.plain(eager_log_probs, self.projected)

    def trl(self):
        import trl.kernels  # noqa: F401, so that its absence shows here

        return lambda: self.plain(trl_log_probs)

    def liger_reference(self) -> dict:
        return {"ref_input": self.projected(self.ref_hidden), "ref_weight": self.ref_weight}


class DPO(Sequences):
    def prepare(self):
        self.groups = pairs(len(self.labels))

    def group_loss(self, log_probs, mask, ref, groups):
        ref_sums = sequence_log_probs(ref[self.members[groups]], mask)
        return DPOLoss(self.beta)(log_probs, mask, ref_sums).loss

    def plain_loss(self, log_probs, ref, mask):
        chosen, rejected = (log_probs - ref).sum(-1).chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected)).mean()

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        module = LigerFusedLinearDPOLoss(beta=self.beta, compiled=self.compiled)
        return lambda: module(self.weight, self.hidden, self.labels, **self.liger_reference())[0]


class ORPO(Sequences):
    has_reference = False

    def prepare(self):
        chosen = len(self.labels) // 2
        self.groups = pairs(len(self.labels))
        self.labels[:chosen] = self.ids[:chosen]
        self.per_group = tokens_per_group(self.labels[:chosen] != -100)

    def group_loss(self, log_probs, mask, ref, groups):
        completion = self.completion[self.members[groups]]
        formula = ORPOLoss(self.beta)
        return formula(log_probs, completion, mask[:, 0], tokens_per_group=self.per_group).loss

    def plain_loss(self, log_probs, ref, mask):
        chosen = len(log_probs) // 2
        nll = -log_probs[:chosen].sum() / (self.labels[:chosen] != -100).sum()
        means = (log_probs * mask).sum(-1) / mask.sum(-1)
        odds_chosen, odds_rejected = (means - torch.log1p(-means.exp())).chunk(2)
        return nll - self.beta * F.logsigmoid(odds_chosen - odds_rejected).mean()

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        module = LigerFusedLinearORPOLoss(beta=self.beta, compiled=self.compiled)
        completions = self.ids.masked_fill(~self.completion, -100)
        return lambda: module(self.weight, self.hidden, completions, nll_target=self.labels)[0]


class KTO(Sequences):
    def prepare(self):
        self.kl = torch.tensor(0.5, device=self.labels.device)

    def group_loss(self, log_probs, mask, ref, groups):
        ref_sums = sequence_log_probs(ref[groups], mask[:, 0])
        formula = KTOLoss(self.beta)
        return formula(log_probs[:, 0], mask[:, 0], self.desirable[groups], ref_sums, self.kl).loss

    def plain_loss(self, log_probs, ref, mask):
        sign = 2.0 * self.desirable - 1.0
        log_ratios = (log_probs - ref).sum(-1)
        return (1 - torch.sigmoid(sign * self.beta * (log_ratios - self.kl))).mean()

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

        module = LigerFusedLinearKTOLoss(beta=self.beta, use_ref_model=True, compiled=self.compiled)
        return lambda: module(
            self.hidden, self.weight, self.labels,
            preference_labels=self.desirable, kl=self.kl, **self.liger_reference(),
        )[0]  # fmt: skip


class GRPO(Sequences):
    beta = 0.04
    reduction = "sum"

    def prepare(self):
        B = len(self.labels)
        self.advantages = torch.linspace(-1, 2, B, device=self.labels.device)  # mean is not 0
        self.formula = GRPOLoss("dapo", beta=self.beta)
        self.normalizers = self.formula.normalizers(self.completion)

    def projected(self, x):
        return x[:, x.shape[1] // 2 :]

    def group_loss(self, log_probs, mask, ref, groups):
        return self.formula(
            log_probs[:, 0], mask[:, 0], self.advantages[groups],
            ref_log_probs=ref[groups], normalizers=self.normalizers,
        ).loss  # fmt: skip

    def plain_loss(self, log_probs, ref, mask):
        ratio, advantages = (log_probs - log_probs.detach()).exp(), self.advantages[:, None]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        kl = (ref - log_probs).exp() - (ref - log_probs) - 1
        return ((loss + self.beta * kl * ratio) * mask).sum() / mask.sum()

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        module = LigerFusedLinearGRPOLoss(
            beta=self.beta, loss_type="dapo", use_bias_correction_kl=True, compiled=self.compiled
        )
        return lambda: module(
            self.projected(self.hidden), self.weight, self.projected(self.ids),
            self.projected(self.completion).float(), self.advantages, **self.liger_reference(),
        )[0]  # fmt: skip


class JSD:
    """Distillation over a quarter of the tokens, all supervised; the student has half the teacher's
    width."""

    bf16_tolerance = 0.1  # a peer takes its softmax in bf16

    def __init__(self, sizes: Sizes):
        B, T, H, V, device, dtype = sizes
        normal = functools.partial(torch.randn, device=device, dtype=dtype)
        N, student = B * T // 4, H // 2
        self.hidden = normal(N, student).requires_grad_()
        self.weight = normal(V, student).mul_(student**-0.5).requires_grad_()
        self.teacher = normal(N, H), normal(V, H).mul_(H**-0.5)
        self.mask = torch.ones(N, dtype=torch.bool, device=device)
        self.options = DivergenceOptions(beta=0.5)
        self.compiled = device == "cuda"

    def describe(self) -> str:
        return f"JSD, {len(self.mask)} tokens"

    def floor(self):
        rows, weight = self.hidden.detach(), self.weight.detach()
        teacher, teacher_weight = self.teacher

        def products():
            three_products(rows, weight)
            teacher @ teacher_weight.t()

        return products

    def divergence(self, reduction: str):
        return linear_divergence(
            self.hidden, self.weight, *self.teacher, self.mask,
            options=self.options, reduction=reduction,
        )[0]  # fmt: skip

    def grouped(self):
        return lambda: self.divergence("mean")

    def generic(self):
        return lambda: self.divergence("none").sum() / len(self.mask)

    def eager(self):
        def loss():
            student = (self.hidden @ self.weight.t()).float().log_softmax(-1)
            teacher = (self.teacher[0] @ self.teacher[1].t()).float().log_softmax(-1)
            mixture = torch.log((student.exp() + teacher.exp()) / 2)
            kls = (F.kl_div(mixture, p, reduction="sum", log_target=True)
                   for p in (student, teacher))  # fmt: skip
            return sum(kls) / (2 * len(self.mask))

        return loss

    def trl(self):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def loss():
            divergence, _ = ChunkedDivergenceFunction.apply(
                self.hidden[self.mask], self.weight, None,
                self.teacher[0][self.mask], self.teacher[1], None, 0.5,
            )  # fmt: skip
            return divergence.sum() / len(self.mask)

        return loss

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=self.compiled)
        labels = torch.zeros_like(self.mask, dtype=torch.int64)
        return lambda: module(self.hidden, self.weight, *self.teacher, labels)


CASES = {case.__name__: case for case in (DPO, ORPO, KTO, GRPO, JSD)}
