"""The losses of `kernels/losses/grpo.py` on lists of numbers, token by token."""

import math

from sequence_losses import mean, sigmoid

from liger_trainer.kernels.losses.grpo import GRPOLoss


def slow_grpo(x, base, o: GRPOLoss, b: dict, items: float | None = None) -> float:
    """The batch's loss at log-probabilities `x`; what is a constant for the gradient is taken at
    `base`. `b` holds lists: mask, advantages [B] or [B, T], and what is given of the rest."""
    rows, B = range(len(x)), len(x)
    kept = [[t for t, m in enumerate(row) if m] for row in b["mask"]]
    top = b.get("top_entropy_mask")
    bonus = [(i, t) for i in rows for t in kept[i] if top is None or top[i][t]]
    sums = []
    for i in rows:
        total = 0.0
        for t in kept[i]:
            total += _token(x, base, o, b, i, kept[i], t)
        if o.loss_type in ("grpo", "sapo"):
            total /= max(1, len(kept[i]))
        sums.append(total)
    tokens = sum(len(k) for k in kept)
    divisor = {
        "bnpo": tokens,
        "dr_grpo": B * (o.max_completion_length or 0),
        **dict.fromkeys(("dapo", "cispo", "vespo"), items or tokens),
    }.get(o.loss_type, B)
    loss = sum(sums) / divisor
    if o.entropy_coef:
        loss -= o.entropy_coef * mean([b["entropy"][i][t] for i, t in bonus])
    return loss


def _token(x, base, o, b, i, kept, t) -> float:
    old = b.get("old_log_probs") or base
    advantage = b["advantages"][i]
    advantage = advantage[t] if isinstance(advantage, list) else advantage

    def ratio(at):
        if o.importance_sampling_level == "sequence":
            return math.exp(mean([at[i][s] - old[i][s] for s in kept]))
        return math.exp(at[i][t] - old[i][t])

    u, u_constant = ratio(x), ratio(base)
    sampling_ratio = b.get("importance_sampling_ratio")
    if o.loss_type == "vespo":
        w = math.prod(math.exp(base[i][s] - old[i][s]) for s in kept)
        if sampling_ratio:
            w *= math.prod(sampling_ratio[i][s] for s in kept)
            sampling_ratio = None
        k, decay = (
            (o.vespo_k_pos, o.vespo_lambda_pos)
            if advantage >= 0
            else (o.vespo_k_neg, o.vespo_lambda_neg)
        )
        loss = -(w**k) * math.exp(decay * (1 - w)) * advantage * x[i][t]
    elif o.loss_type == "cispo":
        loss = -min(u_constant, o.high) * advantage * x[i][t]
    elif o.loss_type == "sapo":
        k = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
        loss = -(4 / k) * sigmoid(k * (u - 1)) * advantage
    else:
        delta = math.inf if o.delta is None else o.delta
        if advantage >= 0:
            loss = -advantage * min(u, delta, 1 + o.high)
        else:
            loss = -advantage * max(min(u, delta), min(u, 1 + o.high), 1 - o.epsilon_low)
    if o.off_policy_mask_threshold is not None and advantage < 0:
        sampler = b.get("sampling_log_probs") or old
        drift = [sampler[i][s] - base[i][s] for s in kept]
        if mean([0.0 if math.isnan(v) else v for v in drift]) > o.off_policy_mask_threshold:
            loss = 0.0
    if b.get("top_entropy_mask") and not b["top_entropy_mask"][i][t]:
        loss = 0.0
    if sampling_ratio:
        row = sampling_ratio[i]
        loss *= row[t] if len(row) > 1 else row[0]
    if o.beta:
        q = math.exp(b["ref_log_probs"][i][t] - x[i][t])
        loss += o.beta * (q - math.log(q) - 1) * (u if o.use_bias_correction_kl else 1.0)
    return loss


def slow_rloo(x, mask, advantages, old, low, high) -> float:
    losses = []
    for i, row in enumerate(x):
        u = math.exp(sum(v for v, m in zip(row, mask[i], strict=True) if m) - old[i])
        a = advantages[i]
        losses.append(-a * (min(u, 1 + high) if a >= 0 else max(u, 1 - low)))
    return mean(losses)
