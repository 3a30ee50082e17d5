"""Policy-gradient losses on sampled completions: GRPO's family and RLOO.

For a completion with tokens t = 1..n, A its advantage (of the completion or of each token), old the
policy that sampled it and ref the reference, let

    d_t = log p_t - log p_old,t
    u_t = e^(d_t), or with importance_sampling_level "sequence" (GSPO, arXiv:2507.18071) e^(mean d)

the loss of a token is what `grpo_tokens.py` lists under loss_type. Completions with A < 0 and
mean(-d) > off_policy_mask_threshold (DeepSeek-V3.2, arXiv:2512.02556) and tokens outside
top_entropy_mask (arXiv:2506.01939) are excluded from it. Then

    beta * k,  k = e^q - q - 1,  q = log p_ref - log p,  times u with use_bias_correction_kl

is added (Schulman's estimate of the KL divergence). The losses also differ in what the sum over the
tokens of B completions is divided by:

    grpo (arXiv:2402.03300), sapo (arXiv:2511.20347)     n of the completion, then B
    bnpo (arXiv:2506.02864)                              tokens of the batch
    dr_grpo (arXiv:2503.20783)                           B * max_completion_length
    dapo (arXiv:2503.14476), cispo (arXiv:2506.13585),   tokens of all batches that one optimizer
    vespo (arXiv:2602.10693)                             step accumulates
    luspo (arXiv:2602.05261)                             B

Finally, entropy_coef times the entropy's mean over tokens is subtracted. RLOO (arXiv:2402.14740)
clips the ratio of a completion, U = e^(sum d): its loss -min(U A, clip(U, 1 - lo, 1 + hi) A) is
divided by B.

Names, defaults and values are those of TRL's GRPOTrainer and RLOOTrainer, except that exponents of
u and k are bounded by 40, and that of U by 80; beyond the bound the gradient is 0.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from .grpo_tokens import Batch, TokenLoss, cispo, clipped, sapo, vespo
from .sequences import (
    bounded_exp,
    check_like,
    check_name,
    check_range,
    check_sequences,
    check_unused,
    lengths,
    masked,
    sequence_log_probs,
)

RATIO_BOUND = 40.0
"""The bound of the exponents of u and k: fp32 can represent the product of both."""

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_BY_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of all accumulated batches
LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
_USED_BY = {
    "epsilon_low": {*_CLIPPED, "cispo"},
    "epsilon_high": {*_CLIPPED, "cispo"},
    "delta": _CLIPPED,
    "importance_sampling_level": set(LOSS_TYPES) - {"vespo"},
    "max_completion_length": {"dr_grpo"},
    "sapo_temperature_pos": {"sapo"},
    "sapo_temperature_neg": {"sapo"},
    "vespo_k_pos": {"vespo"},
    "vespo_lambda_pos": {"vespo"},
    "vespo_k_neg": {"vespo"},
    "vespo_lambda_neg": {"vespo"},
}


class Normalizers(NamedTuple):
    """The divisors of the sums over a batch; see `GRPOLoss.normalizers`."""

    policy: torch.Tensor | float
    entropy: torch.Tensor | float


class PolicyOutput(NamedTuple):
    """What a loss on B completions returns; all but `loss` are detached.

    Per-token values are [B, T], or [B, 1] if one value holds for the whole completion.
    """

    loss: torch.Tensor  # [B]; the batch's loss is the sum over all of its completions
    policy_loss: torch.Tensor  # [B], the same without the entropy bonus
    clipped_low: torch.Tensor | None  # bool: u below its lower bound, A < 0; not cispo, sapo, vespo
    clipped_high: torch.Tensor | None  # bool: u above its upper bound, A > 0; not sapo, vespo
    sequence_weight: torch.Tensor | None = None  # phi; vespo
    kl: torch.Tensor | None = None  # [B, T], what beta multiplies; with beta


@dataclasses.dataclass(frozen=True)
class GRPOLoss:
    """A loss of GRPO's family; the module's docstring has the formulas.

    For cispo `epsilon_high` bounds u itself (papers use about 5); without it `epsilon_low` does.
    Raises ValueError for unknown names, values out of range, and options that the loss ignores.
    """

    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        check_name("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_unused(self, _USED_BY, (self.loss_type,))
        for name in ("beta", "epsilon_low", "epsilon_high", "vespo_k_pos", "vespo_k_neg"):
            check_range(name, getattr(self, name), 0.0)
        for name in ("delta", "off_policy_mask_threshold", "max_completion_length",
                     "sapo_temperature_pos", "sapo_temperature_neg"):  # fmt: skip
            check_range(name, getattr(self, name), 0.0, open_low=True)
        for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
            check_range(name, getattr(self, name), 1e-4)
        check_range("entropy_coef", self.entropy_coef)
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("dr_grpo divides by max_completion_length: give it")
        two_bounds = self.epsilon_high is not None and self.epsilon_low != GRPOLoss.epsilon_low
        if self.loss_type == "cispo" and two_bounds:
            raise ValueError(
                f"epsilon_low={self.epsilon_low} has no effect on loss_type cispo, whose only "
                "bound is epsilon_high: leave it out"
            )
        if not self.beta and not self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl=False has no effect with beta=0, which has no KL penalty: "
                "leave it out, or give beta"
            )

    @property
    def high(self) -> float:
        """The hi of the formula."""
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def couples_groups(self) -> bool:
        """Whether a completion's loss depends on the others: yes, through the normalizers."""
        return True

    def normalizers(
        self,
        mask: torch.Tensor,
        top_entropy_mask: torch.Tensor | None = None,
        *,
        accumulation_steps: int = 1,
        num_items_in_batch: torch.Tensor | float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Normalizers:
        """Return the divisors of the sums over a batch of B completions with `mask` [B, T].

        The caller sums the losses of `accumulation_steps` batches. dapo, cispo and vespo read
        num_items_in_batch, the tokens of all these batches (divided by the number of processes if
        losses are averaged over them); without it, every batch counts as having as many as this.
        """
        count = accumulation_steps * mask.sum().clamp_min(1).to(dtype)
        if self.loss_type in _BY_TOKENS and num_items_in_batch is not None:
            policy = num_items_in_batch
            if torch.is_tensor(policy):
                policy = policy.to(mask.device, dtype)
                policy = policy.where(policy > 0, 1.0)
            else:
                policy = policy or 1
        elif self.loss_type in (*_BY_TOKENS, "bnpo"):
            policy = count
        else:
            policy = mask.shape[0] * accumulation_steps * (self.max_completion_length or 1)
        if top_entropy_mask is not None:
            count = accumulation_steps * (mask & top_entropy_mask).sum().clamp_min(1).to(dtype)
        return Normalizers(policy, count)

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        *,
        old_log_probs: torch.Tensor | None = None,
        ref_log_probs: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        top_entropy_mask: torch.Tensor | None = None,
        sampling_log_probs: torch.Tensor | None = None,
        importance_sampling_ratio: torch.Tensor | None = None,
        normalizers: Normalizers | None = None,
    ) -> PolicyOutput:
        """Return losses of B completions; the batch's loss is the sum over all of them.

        log_probs [B, T] (fp32 or fp64), mask [B, T] bool, True at the tokens that the policy
        sampled, advantages [B] or [B, T]. The others are optional: old_log_probs [B, T] (default:
        log_probs), ref_log_probs [B, T] (required with beta, else refused), entropy [B, T]
        (required with entropy_coef, differentiable), top_entropy_mask [B, T] bool,
        sampling_log_probs [B, T] of the sampler, for off_policy_mask_threshold (NaN where unknown;
        default: old_log_probs), importance_sampling_ratio [B, T] or [B, 1] of old policy to
        sampler, a factor of the loss (for vespo [B, T], a factor of W), normalizers of the whole
        batch (default: of these completions). Raises ValueError if a tensor does not fit.
        """
        check_sequences(log_probs, mask, "[B, T]")
        self._check(
            log_probs, advantages, importance_sampling_ratio, top_entropy_mask,
            old_log_probs=old_log_probs, ref_log_probs=ref_log_probs, entropy=entropy,
            sampling_log_probs=sampling_log_probs,
        )  # fmt: skip
        if normalizers is None:
            normalizers = self.normalizers(mask, top_entropy_mask, dtype=log_probs.dtype)
        old = (log_probs if old_log_probs is None else old_log_probs).detach()
        batch = self._batch(log_probs, mask, advantages, old, importance_sampling_ratio)
        token = self._token_loss(batch)
        loss, kl, bonus_mask = token.loss, None, mask
        if self.off_policy_mask_threshold is not None:
            sampling = old if sampling_log_probs is None else sampling_log_probs.detach()
            loss = loss * self._on_policy(batch, sampling)
        if top_entropy_mask is not None:
            loss, bonus_mask = loss * top_entropy_mask, mask & top_entropy_mask
        if batch.sampling_ratio is not None and self.loss_type != "vespo":
            loss = loss * batch.sampling_ratio
        if self.beta:
            penalty = self._kl(batch, ref_log_probs.detach())
            loss, kl = loss + self.beta * penalty, penalty.detach()
        loss_B = masked(loss, mask).sum(-1)
        if self.loss_type in ("grpo", "sapo"):
            loss_B = loss_B / lengths(mask, loss.dtype)
        loss_B = policy_loss_B = loss_B / normalizers.policy
        if self.entropy_coef:
            bonus_B = masked(entropy, bonus_mask).sum(-1) / normalizers.entropy
            loss_B = loss_B - self.entropy_coef * bonus_B.to(loss_B.dtype)
        return PolicyOutput(loss_B, policy_loss_B.detach(), *token[1:], kl)

    def _check(self, log_probs, advantages, sampling_ratio, top_entropy_mask, **per_token):
        """Raise ValueError for a tensor that does not fit, is missing, or has no effect."""
        shape, device = log_probs.shape, log_probs.device
        check_like("advantages", advantages, shape[: max(1, advantages.dim())], device)
        if sampling_ratio is not None:
            whole = sampling_ratio.shape[1:] == (1,) and self.loss_type != "vespo"
            fits = (shape[0], 1) if whole else shape
            check_like("importance_sampling_ratio", sampling_ratio, fits, device)
        if top_entropy_mask is not None:
            check_like("top_entropy_mask", top_entropy_mask, shape, device)
            if top_entropy_mask.dtype != torch.bool:
                raise ValueError(f"top_entropy_mask is {top_entropy_mask.dtype}; give it as bool")
        needed = {"ref_log_probs": self.beta, "entropy": self.entropy_coef}
        for name, tensor in per_token.items():
            if tensor is not None or needed.get(name):
                check_like(name, tensor, shape, device)
        if per_token["ref_log_probs"] is not None and not self.beta:
            raise ValueError(
                "ref_log_probs have no effect with beta=0: leave them out, or give beta"
            )

    def _token_loss(self, b: Batch) -> TokenLoss:
        if self.loss_type == "cispo":
            return cispo(b, self.high)
        if self.loss_type == "sapo":
            return sapo(b, self.sapo_temperature_pos, self.sapo_temperature_neg)
        if self.loss_type == "vespo":
            return vespo(
                b,
                (self.vespo_k_pos, self.vespo_lambda_pos),
                (self.vespo_k_neg, self.vespo_lambda_neg),
            )
        return clipped(b.ratio, b.advantages, self.epsilon_low, self.high, self.delta)

    def _batch(self, log_probs, mask, advantages, old, sampling_ratio) -> Batch:
        log_probs_BT = masked(log_probs, mask)
        log_ratio_BT = log_probs_BT - masked(old.to(log_probs.dtype), mask)
        log_weight = log_ratio_BT
        if self.importance_sampling_level == "sequence":
            log_weight = (log_ratio_BT.sum(-1) / lengths(mask, log_probs.dtype))[:, None]
        advantages = advantages.detach().to(log_probs.dtype)
        if sampling_ratio is not None:
            sampling_ratio = _per_token(sampling_ratio.detach().to(advantages), mask)
        return Batch(
            log_probs_BT,
            log_ratio_BT,
            bounded_exp(log_weight, RATIO_BOUND),
            advantages[:, None] if advantages.dim() == 1 else _per_token(advantages, mask),
            mask,
            sampling_ratio,
        )

    def _on_policy(self, b: Batch, sampling: torch.Tensor) -> torch.Tensor:
        """Return whether a completion (a token, if each has an advantage) stays in the loss."""
        drift_BT = torch.nan_to_num(sampling - b.log_probs.detach(), nan=0.0)
        drift_B = masked(drift_BT, b.mask).sum(-1) / lengths(b.mask, drift_BT.dtype)
        return (b.advantages >= 0) | (drift_B <= (self.off_policy_mask_threshold or 0.0))[:, None]

    def _kl(self, b: Batch, ref: torch.Tensor) -> torch.Tensor:
        """Return k [B, T], 0 outside the mask."""
        q = masked(ref.to(b.log_probs.dtype), b.mask) - b.log_probs
        q = q.clamp(max=RATIO_BOUND)
        kl = torch.expm1(q) - q
        return kl * b.ratio if self.use_bias_correction_kl else kl


def _per_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return values [B, T] with 0 outside the mask, where they may be NaN; leave [B, 1] alone."""
    return masked(values, mask) if values.shape == mask.shape else values


@dataclasses.dataclass(frozen=True)
class RLOOLoss:
    """RLOO; the module's docstring has the formula. Raises ValueError for bounds below 0."""

    epsilon_low: float = 0.2
    epsilon_high: float | None = None

    def __post_init__(self):
        check_range("epsilon_low", self.epsilon_low, 0.0)
        check_range("epsilon_high", self.epsilon_high, 0.0)

    @property
    def couples_groups(self) -> bool:
        """Whether a completion's loss depends on the others: yes, through their number."""
        return True

    def __call__(
        self,
        log_probs: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        *,
        old_log_probs: torch.Tensor | None = None,
        num_sequences: int | None = None,
    ) -> PolicyOutput:
        """Return losses of B completions; the batch's loss is the sum over all of them.

        log_probs [B, T] (fp32 or fp64), mask [B, T] bool, advantages [B], old_log_probs [B], summed
        over each completion (default: those of log_probs), num_sequences of the whole batch
        (default: B). `clipped_low` and `clipped_high` are [B, 1].
        """
        check_sequences(log_probs, mask, "[B, T]")
        check_like("advantages", advantages, log_probs.shape[:1], log_probs.device)
        sums_B = sequence_log_probs(log_probs, mask)
        old_B = sums_B if old_log_probs is None else old_log_probs
        check_like("old_log_probs", old_B, sums_B.shape, log_probs.device)
        ratio_B = bounded_exp(sums_B - old_B.detach().to(sums_B.dtype))
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        token = clipped(ratio_B, advantages.detach().to(sums_B.dtype), self.epsilon_low, high)
        loss_B = token.loss / (num_sequences or log_probs.shape[0])
        return PolicyOutput(
            loss_B, loss_B.detach(), token.clipped_low[:, None], token.clipped_high[:, None]
        )
