"""A linear problem whose margins are known: the oracle of attacks."""

from __future__ import annotations

import torch
from torch import nn

from quantguard.activation import QuantActivation

EPS = {"linf": 0.03, "l2": 0.2}
SIDE = 6


class Problem:
    """Images whose distance to the only decision boundary, w . x = c, is known."""

    def __init__(self, norm: str, n: int = 400, seed: int = 0) -> None:
        self.norm, self.eps = norm, EPS[norm]
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(SIDE * SIDE, generator=g)
        dual = self.w.abs().sum() if norm == "linf" else self.w.norm()
        # Margins on both sides of eps, up to 2 eps. Pixels stay where no bound is met.
        self.margin = torch.linspace(0.02, 1.98, n) * self.eps
        self.y = torch.randint(0, 2, (n,), generator=g)
        x = 0.5 + 0.1 * (torch.rand(n, SIDE * SIDE, generator=g) - 0.5)
        self.c = self.w.sum() / 2
        wanted = (2 * self.y - 1) * self.margin * dual
        x += ((wanted - (x @ self.w - self.c)) / self.w.square().sum()).unsqueeze(1) * self.w
        self.x = x.view(n, 1, SIDE, SIDE)
        assert self.x.min() > 0.2 and self.x.max() < 0.8

    def linear(self) -> nn.Module:
        """Return logits (-s, s), s = w . x - c."""
        layer = nn.Linear(SIDE * SIDE, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.stack([-self.w, self.w]))
            layer.bias.copy_(torch.stack([self.c, -self.c]))
        return nn.Sequential(nn.Flatten(), layer).eval()

    def staircase(self, width: float) -> nn.Module:
        """Return the same decisions through one threshold with a window of this width."""
        first, last = nn.Linear(SIDE * SIDE, 1), nn.Linear(1, 2)
        with torch.no_grad():
            first.weight.copy_(self.w[None])
            first.bias.copy_(-self.c[None])
            last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            last.bias.copy_(torch.tensor([0.5, -0.5]))
        step = QuantActivation.from_thresholds([0.0], step=1.0, width=width)
        return nn.Sequential(nn.Flatten(), first, step, last).eval()
