"""Checks of minimum-norm attacks against a linear problem with known distances."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import (
    DDN,
    Boundary,
    CarliniWagner,
    DeepFool,
    FoolboxModel,
    HopSkipJump,
)
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

# (attack, largest distance of its result over that of the boundary, number of images); HopSkipJump
# and Boundary with this many queries.
FACTORS = [(CarliniWagner(9, 100), 1.1, 40), (DDN(150), 1.1, 40), (DeepFool("l2"), 1.1, 40),
           (DeepFool("linf"), 1.1, 40), (HopSkipJump("l2", 2000), 1.1, 6),
           (HopSkipJump("linf", 2000), 1.2, 6), (Boundary(3000), 1.5, 1)]

GRADIENT = [CarliniWagner(2, 20), DDN(20), DeepFool("l2"), DeepFool("linf")]

QUERIES = [HopSkipJump("l2", 600), HopSkipJump("linf", 600), Boundary(300)]


def name(value: Any) -> str:
    return f"{type(value).__name__} {value.norm}" if hasattr(value, "norm") else str(value)


def problem_of(attack: Any, n: int = 40) -> Problem:
    """Return a problem without images next to the boundary."""
    problem = Problem(attack.norm, n=n)
    far = problem.margin > 0.1 * problem.eps
    problem.x, problem.y, problem.margin = problem.x[far], problem.y[far], problem.margin[far]
    return problem


def spread(total: int, few: int) -> Tensor:
    return torch.linspace(0, total - 1, few).long()


class Scaled(nn.Module):
    """Model on (low, low + width) that computes the same as one on (0, 1)."""

    def __init__(self, model: nn.Module, low: float, width: float) -> None:
        super().__init__()
        self.model, self.low, self.width = model, low, width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - self.low) / self.width)
        return out


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = 0 * x.flatten(1)[:, :2]
        return out + torch.tensor([1.0, 0.0])


def found(attack: Any, model: nn.Module, x: Tensor, y: Tensor,
          bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    threat = Threat(attack.norm, 0.0, bounds)
    result: Tensor = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y))
    return result


def assert_near(attack: Any, factor: float, images: int,
                bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Check that every image is fooled, no nearer than possible and hardly farther."""
    problem = problem_of(attack)
    rows, (low, high) = spread(len(problem.x), images), bounds
    model = Scaled(problem.linear(), low, high - low).eval()
    x, y = low + (high - low) * problem.x[rows], problem.y[rows]
    result = found(attack, model, x, y, bounds)
    assert result.shape == x.shape and result.dtype == x.dtype
    assert result.min() >= low and result.max() <= high
    with torch.no_grad():
        assert (model(result).argmax(1) != y).all()
    order = 2 if attack.norm == "l2" else torch.inf
    ratio = (result - x).flatten(1).norm(order, dim=1) / (high - low) / problem.margin[rows]
    assert ratio.min() >= 1 - 1e-3 and ratio.max() <= factor
