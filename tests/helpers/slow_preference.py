"""The losses of `kernels/losses/dpo.py` on lists of numbers, from the papers."""

import math

from sequence_losses import mean, sigmoid, softplus


class Slow:
    """The losses on lists of numbers, pair by pair; each from the paper's own form of it."""

    def __init__(self, mask, ref, beta=0.1, label_smoothing=0.0, tau=0.05, divergence="reverse_kl",
                 alpha=0.5, ld_alpha=None):  # fmt: skip
        self.mask, self.ref = mask.tolist(), ref.tolist()
        self.beta, self.e, self.tau = beta, label_smoothing, tau
        self.divergence, self.alpha, self.ld_alpha = divergence, alpha, ld_alpha

    def sequence(self, log_probs, g, side):
        kept = [x for x, m in zip(log_probs[g][side], self.mask[g][side], strict=True) if m]
        shorter = min(sum(self.mask[g][0]), sum(self.mask[g][1]))
        tail = 1.0 if self.ld_alpha is None else self.ld_alpha
        return sum(x if i < shorter else tail * x for i, x in enumerate(kept))

    def score(self, log_ratio):
        """Return f'(t) of the f-divergence, from f-DPO's table."""
        t = math.exp(log_ratio)
        if self.divergence == "forward_kl":
            return 1 - 1 / t
        if self.divergence == "js_divergence":
            return math.log(2 * t / (1 + t))
        if self.divergence == "alpha_divergence":
            return (t ** (self.alpha - 1) - 1) / (self.alpha - 1)
        return log_ratio

    def __call__(self, name, log_probs, weights=None):
        if name.startswith("aot"):
            return self.aot(name, log_probs)
        if name == "sft":
            kept = [
                x
                for row, mask in zip(log_probs, self.mask, strict=True)
                for x, m in zip(row[0], mask[0], strict=True)
                if m
            ]
            return -mean(kept)
        losses = [self.pair(name, log_probs, g) for g in range(len(log_probs))]
        weights = weights or [1.0] * len(losses)
        return mean([w * x for w, x in zip(weights, losses, strict=True)])

    def pair(self, name, log_probs, g):
        b, e = self.beta, self.e
        rw, rl = (self.sequence(log_probs, g, side) - self.ref[g][side] for side in (0, 1))
        nw, nl = (sum(self.mask[g][side]) for side in (0, 1))
        # Bradley-Terry, both ways round: 1 - p has few digits where p is near 1.
        preferred = sigmoid(b * (self.score(rw) - self.score(rl)))
        reversed_ = sigmoid(b * (self.score(rl) - self.score(rw)))
        averaged = self.score(rw) / nw - self.score(rl) / nl
        if name == "sigmoid":
            return -math.log(preferred)
        if name == "hinge":
            return max(0.0, 1 - b * (self.score(rw) - self.score(rl)))
        if name == "ipo":
            return (averaged - 1 / (2 * b)) ** 2
        if name == "exo_pair":
            target, model = [1 - e, e], [preferred, reversed_]
            return sum(q * math.log(q / p) for q, p in zip(model, target, strict=True))
        if name == "nca_pair":
            return softplus(-b * rw) + 0.5 * softplus(b * rw) + 0.5 * softplus(b * rl)
        if name == "robust":
            return (-(1 - e) * math.log(preferred) + e * math.log(reversed_)) / (1 - 2 * e)
        if name == "bco_pair":
            return -math.log(sigmoid(b * rw)) - math.log(sigmoid(-b * rl))
        if name == "sppo_hard":  # the win rate is 1 for the chosen, 0 for the rejected
            return (rw - (1 - 0.5) / b) ** 2 + (rl - (0 - 0.5) / b) ** 2
        if name == "apo_zero":
            return (1 - sigmoid(b * rw)) + sigmoid(b * rl)
        if name == "apo_down":
            return sigmoid(b * rw) + (1 - sigmoid(b * (rw - rl)))
        if name == "discopop":
            x = b * (self.score(rw) - self.score(rl))
            gate = sigmoid(x / self.tau)
            return (1 - gate) * math.log(1 + math.exp(-x)) + gate * math.exp(-x)
        assert name == "sigmoid_norm"
        return softplus(-b * averaged)

    def aot(self, name, log_probs):
        sums = [
            [self.sequence(log_probs, g, side) for side in (0, 1)] for g in range(len(log_probs))
        ]
        if name == "aot":
            left = sorted(chosen - rejected for chosen, rejected in sums)
            right = sorted(chosen - rejected for chosen, rejected in self.ref)
        else:
            left, right = (
                sorted(s[side] - r[side] for s, r in zip(sums, self.ref, strict=True))
                for side in (0, 1)
            )
        gaps = [self.beta * (x - y) for x, y in zip(left, right, strict=True)]
        return mean([(1 - self.e) * softplus(-x) + self.e * softplus(x) for x in gaps])
