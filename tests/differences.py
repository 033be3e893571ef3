"""Checks of both attacks by finite differences against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Problem, distance
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel, PixelModel, finite_difference
from quantguard.attacks.base import fb
from quantguard.attacks.finite_difference import FiniteDifferenceAttack
from quantguard.core.specs import Threat

# 36 pixels, a quarter at a time
OPTIONS: dict[str, Any] = {"steps": 20, "coordinates": 9}
QUERIES = 20 * 19 + 1


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=120)


class Spy(nn.Module):
    """Model that records its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        result: Tensor = self.model(x)
        return result


def found(problem: Problem, model: nn.Module, attack: FiniteDifferenceAttack,
          rows: slice = slice(None)) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model, Threat(problem.norm, problem.eps)),
                                problem.x[rows], fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps)
    return result


def broken(problem: Problem, model: nn.Module, attack: FiniteDifferenceAttack) -> Tensor:
    """Return which images are broken; check that points are valid, and none outside eps breaks."""
    x = found(problem, model, attack)
    assert x.shape == problem.x.shape and x.dtype == problem.x.dtype
    assert distance(x, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        fooled = model(x).argmax(1) != problem.y
    assert not fooled[problem.margin >= problem.eps].any()
    return fooled


def assert_finds(problem: Problem, attack: FiniteDifferenceAttack, queries: int) -> None:
    """Check that 95 % of the images inside eps are broken, with this many queries an image."""
    model = PixelModel(problem.linear(), Threat(problem.norm, problem.eps))
    fooled = broken(problem, model, attack)
    assert fooled[problem.margin < problem.eps].float().mean() >= 0.95
    assert model.queries <= queries * len(problem.x) and model.gradients == 0


def break_it(attack: FiniteDifferenceAttack, breaking: str, patch: pytest.MonkeyPatch) -> None:
    """Break an attack, so that the oracle must reject it."""
    if breaking == "sign":
        original = finite_difference.height
        patch.setattr(finite_difference, "height", lambda z, y: -original(z, y))
    elif breaking == "projection":
        patch.setattr(finite_difference, "project",
                      lambda x, center, eps, norm, bounds: x.clamp(*bounds))
    else:
        search, scale = attack._search, {"half eps": 0.5, "eps ignored": 3.0}[breaking]
        patch.setattr(attack, "_search", lambda m, x, y, eps: search(m, x, y, scale * eps))


BREAKINGS = ("sign", "projection", "half eps", "eps ignored")
