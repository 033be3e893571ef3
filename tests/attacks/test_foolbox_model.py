"""FoolboxModel: our attacks and Foolbox's, called as Foolbox's are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from oracle import Problem, distance
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD, FoolboxModel, Noise
from quantguard.attacks.base import fb
from quantguard.core.errors import ConversionError
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def test_usable_through_a_plain_foolbox_call(problem: Problem) -> None:
    fmodel = qg.attacks.FoolboxModel(problem.linear(), Threat(problem.norm, problem.eps))
    attack = qg.attacks.PGD("ce", 60, rel_step=0.1, norm=problem.norm)
    raw, clipped, fooled = attack(fmodel, problem.x, problem.y, epsilons=problem.eps)
    assert (fooled == (problem.margin < problem.eps)).float().mean() >= 0.99
    assert distance(clipped, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert raw.shape == problem.x.shape
    several = attack(fmodel, problem.x, problem.y, epsilons=[0.0, problem.eps / 2, problem.eps])[2]
    counts = several.sum(1).tolist()
    assert counts[0] == 0 and counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("attack", [
    fb.attacks.LinfPGD(steps=10), fb.attacks.L2PGD(rel_stepsize=0.5, steps=10),
    fb.attacks.LinfFastGradientAttack()], ids=lambda a: type(a).__name__)
def test_foolbox_model_works_with_foolboxs_own_attacks(attack: Any) -> None:
    problem = Problem("linf", 20)
    fmodel = FoolboxModel(problem.linear())
    raw, _, fooled = attack(fmodel, problem.x, problem.y, epsilons=1.0)
    assert fooled.all() and raw.shape == problem.x.shape


def test_a_plain_foolbox_model_is_refused_where_the_module_is_needed(problem: Problem) -> None:
    plain = fb.PyTorchModel(problem.linear(), bounds=(0, 1), device="cpu")
    with pytest.raises(ConversionError, match="hides it(.|\n)*quantguard.attacks.FoolboxModel"):
        PGD()(plain, problem.x, problem.y, epsilons=0.1)
    _, _, fooled = Noise("linf", 2)(plain, problem.x, problem.y, epsilons=0.1)
    assert fooled.shape == problem.y.shape


def test_a_targeted_criterion_is_refused(problem: Problem) -> None:
    target = fb.criteria.TargetedMisclassification(1 - problem.y)
    with pytest.raises(ValueError, match=r"(?i)criterion|untargeted"):
        PGD("ce", 2)(FoolboxModel(problem.linear()), problem.x, target, epsilons=0.1)
