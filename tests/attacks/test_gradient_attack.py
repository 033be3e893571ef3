"""Gradient attacks drop broken images, respect the bounds, and leave no trace on the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from oracle import Exploding, Problem, distance
from torch import Tensor, nn

from quantguard.attacks import APGD, PGD, FoolboxModel, Noise, PixelModel, Square
from quantguard.attacks import gradient_attack as base_module
from quantguard.attacks.base import fb
from quantguard.attacks.gradient_attack import BestFound
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("attack", [PGD("ce", 20), PGD("margin", 20, sharpness=(2, 16), target=1),
                                    APGD("ce", 20, sharpness=(2, 16)), APGD("dlr", 20, target=1),
                                    Square(100)], ids=lambda a: type(a).__name__)
def test_dropping_broken_images_changes_no_result(quantized: nn.Module, attack: Any,
                                                digits: tuple[Tensor, Tensor],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    right = (quantized(digits[0]).argmax(1) == digits[1]).nonzero().flatten()[:100]
    x, y = digits[0][right], digits[1][right]
    found = {}
    for least in (base_module._LEAST, 100):
        monkeypatch.setattr(base_module, "_LEAST", least)
        model = PixelModel(quantized, Threat(eps=0.2))
        points = attack.run(FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.2)
        found[least] = points, model.queries
    (some, few), (every, all_) = found.values()
    assert torch.equal(some, every)
    assert few < 0.9 * all_


def test_batches_shrink_by_quarters_and_contain_all_survivors() -> None:
    labels = torch.zeros(100, dtype=torch.long)
    best = BestFound(torch.zeros(100, 2), labels)
    survivors = torch.tensor([3, 4, 50, 98])

    def judge(broken: Tensor) -> None:
        logits = torch.stack([~broken, broken], 1).float()[best.rows]
        best.judge(torch.full((len(best.rows), 2), 1.0), logits)

    broken = torch.zeros(100, dtype=torch.bool)
    broken[:24] = True
    judge(broken)
    assert best.survivors() is None  # 76 survive
    broken[:] = True
    broken[survivors] = False
    judge(broken)
    rows = best.survivors()
    assert rows is not None and len(rows) == len(best.rows) == 9  # 100, 75, 57, ..., at least 8
    assert torch.isin(survivors, best.rows).all()
    assert torch.equal(best.rows, best.rows.sort().values)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_candidates_stay_within_bounds_at_the_edge_of_the_range(bounds: tuple[float, float],
                                                                problem: Problem) -> None:
    low, high = bounds
    x = torch.where(problem.x > 0.5, high, low)
    eps = 0.2 * (high - low)
    threat = Threat(problem.norm, eps, bounds)
    fmodel = FoolboxModel(problem.linear(), threat)
    for attack in (
        PGD("ce", 5, norm=problem.norm),
        PGD("ce", 5, norm=problem.norm, sharpness=(2, 8)),
        Noise(problem.norm, 4),
    ):
        found = attack.run(fmodel, x, fb.criteria.Misclassification(problem.y), epsilon=eps)
        assert low <= found.min() and found.max() <= high
        assert distance(found, x, problem.norm).max() <= eps * (1 + 1e-5)


ATTACKS = [PGD("ce", 3), PGD("margin", 3, sharpness=(2, 16)), PGD("ce", 3, bits=32),
           PGD("ce", 3, mode="sigmoid(4)"), Noise("linf", 3), PGD("ce", 3, norm="l2")]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: str(a)[:60])
@pytest.mark.parametrize("calls", [1, 2, 1000])
def test_attacks_leave_no_trace_even_when_the_model_fails(attack: Any, calls: int,
                                                          untouched: Untouched) -> None:
    problem = Problem("linf", 30)
    model = problem.quantized(width=1.0)
    model.append(Exploding(calls))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    fmodel = FoolboxModel(model)
    fails = pytest.raises(ZeroDivisionError) if calls < 1000 else nullcontext()
    with untouched(model), fails:
        attack.run(fmodel, problem.x, fb.criteria.Misclassification(problem.y), epsilon=0.1)
    assert not problem.x.requires_grad
