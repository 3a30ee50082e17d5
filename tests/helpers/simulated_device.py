"""A device that exists only as numbers of bytes."""

import torch


class Simulated:
    """A device on which a step takes what the module's docstring says, and weights grow once."""

    device = torch.device("cpu")

    def __init__(self, base, rest, cost, states=0, size=0):
        self.base, self.rest, self.cost, self.states, self.size = base, rest, cost, states, size
        self.now = self.most = base
        self.released = 0

    def allocated(self):
        return self.now

    def peak(self):
        return self.most

    def usable(self):
        return self.size

    def release(self):
        self.released += 1

    def step(self, budget, tokens):
        """Run one step; return what was chosen, and how much memory it took."""
        kept = budget.choose(tokens)
        if not budget.cost:
            budget.cost = self.cost
        taken = self.now + self.rest * tokens + kept * tokens * self.cost
        self.most = max(self.most, taken)
        if self.now == self.base:  # the optimizer's states come with its first step
            self.now += self.states
            self.most = max(self.most, self.now + self.states)
        return kept, taken
