"""Linear problem with known margins, the oracle of attacks, and checks of attacks against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel
from quantguard.attacks.base import fb
from quantguard.core.specs import Threat
from quantguard.nn.quant_activation import QuantActivation

EPS = {"linf": 0.03, "l2": 0.2}
SIDE = 6


class Problem:
    """Images with known distances to the only decision boundary, w . x = c."""

    def __init__(self, norm: str, n: int = 400, seed: int = 0) -> None:
        self.norm, self.eps = norm, EPS[norm]
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(SIDE * SIDE, generator=g)
        dual = self.w.abs().sum() if norm == "linf" else self.w.norm()
        # Margins on both sides of eps, up to 2 eps. Pixels stay far from the bounds.
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

    def quantized(self, width: float) -> nn.Module:
        """Return the same decisions through a 1-bit quantizer with a window of this width."""
        first, last = nn.Linear(SIDE * SIDE, 1), nn.Linear(1, 2)
        with torch.no_grad():
            first.weight.copy_(self.w[None])
            first.bias.copy_(-self.c[None])
            last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            last.bias.copy_(torch.tensor([0.5, -0.5]))
        step = QuantActivation.from_thresholds([0.0], step=1.0, width=width)
        return nn.Sequential(nn.Flatten(), first, step, last).eval()

    staircase = quantized  # tests/certification uses this name


def distance(x: Tensor, center: Tensor, norm: str) -> Tensor:
    delta = (x - center).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def assert_breaks_up_to_margin(attack: Any, problem: Problem, model: nn.Module) -> None:
    """Check that 99 % of images inside eps are broken, none outside, and all points are valid."""
    threat = Threat(problem.norm, problem.eps)
    criterion = fb.criteria.Misclassification(problem.y)
    found = attack.run(FoolboxModel(model, threat), problem.x, criterion, epsilon=problem.eps)
    assert found.shape == problem.x.shape and found.dtype == problem.x.dtype
    assert distance(found, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    with torch.no_grad():
        fooled = model(found).argmax(1) != problem.y
    inside = problem.margin < problem.eps
    assert fooled[inside].float().mean() >= 0.99
    assert not fooled[~inside].any()


class Exploding(nn.Module):
    """Identity that raises after a number of calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return x
