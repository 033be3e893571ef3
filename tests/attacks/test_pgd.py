"""PGD against classifiers whose margins are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from oracle import Problem, assert_breaks_up_to_margin, distance
from torch import Tensor, nn

from quantguard.attacks import PGD, FoolboxModel, Noise
from quantguard.attacks import pgd as pgd_module
from quantguard.attacks.base import fb
from quantguard.attacks.losses import margin
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("options", [
    {}, {"noise": 0.0}, {"decay": True, "rel_step": 0.2}, {"sharpness": (2, 16)},
    {"mode": "sigmoid(8)"}, {"mode": "ste"}, {"bits": 32}], ids=str)
def test_pgd_breaks_a_linear_model_up_to_its_margin(problem: Problem, loss: str,
                                                    options: dict[str, Any]) -> None:
    attack = PGD(loss, 60, norm=problem.norm, **{"rel_step": 0.1, **options})
    assert_breaks_up_to_margin(attack, problem, problem.linear())


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("options", [
    {"mode": "ramp"}, {"mode": "ste"}, {"mode": "sigmoid"}, {"mode": "sigmoid(2)"},
    {"mode": "parent"}, {"sharpness": (2, 16)}, {"sharpness": (8, 8)}], ids=str)
def test_pgd_breaks_a_quantized_model_up_to_its_margin(problem: Problem, loss: str,
                                                 options: dict[str, Any]) -> None:
    attack = PGD(loss, 60, rel_step=0.1, norm=problem.norm, **options)
    assert_breaks_up_to_margin(attack, problem, problem.quantized(width=100.0))


class EpsIgnored(PGD):
    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        return super().run(model, inputs, criterion, epsilon=3 * epsilon)


def _flipped(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda gradient, norm: -original(gradient, norm)


def _unprojected(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, center, eps, norm, bounds: x.clamp(*bounds)


@pytest.mark.parametrize(("name", "breaking"), [("ascend", _flipped), ("project", _unprojected)])
def test_the_oracle_rejects_a_broken_pgd(problem: Problem, name: str, breaking: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgd_module, name, breaking(getattr(pgd_module, name)))
    with pytest.raises(AssertionError):
        assert_breaks_up_to_margin(PGD("ce", 60, rel_step=0.1, norm=problem.norm), problem,
                                   problem.linear())


def test_the_oracle_rejects_a_pgd_that_ignores_eps(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_breaks_up_to_margin(EpsIgnored("ce", 60, norm=problem.norm), problem,
                                   problem.linear())


def test_the_oracle_rejects_an_attack_that_does_nothing(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_breaks_up_to_margin(Noise(problem.norm), problem, problem.linear())


def test_the_softened_model_has_a_gradient_outside_a_narrow_window(problem: Problem) -> None:
    """No image is in the window: ramp's gradient is 0 everywhere, the softened model's nowhere."""
    model = problem.quantized(width=0.03)
    fmodel, criterion = FoolboxModel(model), fb.criteria.Misclassification(problem.y)
    options: dict[str, Any] = {"rel_step": 0.1, "norm": problem.norm, "noise": 0.0}
    for loss in ("ce", "margin"):
        ramp = PGD(loss, 60, **options).run(fmodel, problem.x, criterion, epsilon=problem.eps)
        assert torch.equal(ramp, problem.x)
        assert_breaks_up_to_margin(PGD(loss, 60, sharpness=(0.2, 2), **options), problem, model)


@pytest.mark.parametrize("options", [
    {"loss": "margin", "target": 1}, {"loss": "scaled"}, {"average": 3}, {"noise": 0.3},
    {"loss": "margin", "target": 5}])
def test_every_option_breaks_models_up_to_their_margin(problem: Problem,
                                                   options: dict[str, Any]) -> None:
    options = {"loss": "ce", "rel_step": 0.4, "decay": True, "norm": problem.norm, **options}
    attack = PGD(steps=60, **options)
    assert_breaks_up_to_margin(attack, problem, problem.linear())
    assert_breaks_up_to_margin(attack, problem, problem.quantized(width=100.0))


def test_survivors_are_returned_at_their_largest_margin(problem: Problem) -> None:
    model, criterion = problem.linear(), fb.criteria.Misclassification(problem.y)
    survivors = problem.margin > problem.eps
    margins = []
    for steps in (3, 30):  # a long step that overshoots must not replace a better iterate
        x = PGD("ce", steps, rel_step=3.0, norm=problem.norm).run(
            FoolboxModel(model), problem.x, criterion, epsilon=problem.eps)
        with torch.no_grad():
            margins.append(margin(model(x), problem.y)[survivors])
    assert (margins[1] >= margins[0] - 1e-6).all()


def test_a_restart_begins_at_the_starting_points(problem: Problem) -> None:
    model = problem.linear()
    criterion = fb.criteria.Misclassification(problem.y)
    broken_points = PGD("ce", 60, rel_step=0.1, norm=problem.norm).run(
        FoolboxModel(model), problem.x, criterion, epsilon=problem.eps)
    for restart in (True, False):
        attack = PGD("ce", 1, rel_step=1e-6, noise=0.0, norm=problem.norm, restart=restart)
        x = attack.run(FoolboxModel(model), problem.x, criterion, epsilon=problem.eps,
                       starting_points=broken_points)
        with torch.no_grad():
            broken = int((model(x).argmax(1) != problem.y).sum())
        assert broken == (int((problem.margin < problem.eps).sum()) if restart else 0)
        assert distance(x, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)


@pytest.mark.parametrize("options", [{"average": 0}, {"target": 1}, {"noise": 1.5},
                                     {"noise": -0.1}])
def test_invalid_options(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        PGD("ce", 3, **options)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"loss": "dlr"}, "ce, margin"), ({"steps": 0}, "at least 1")])
def test_invalid_options_name_valid_ones(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PGD(**arguments)


def test_an_unknown_mode_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="straight"):
        PGD("ce", 2, mode="straight")(FoolboxModel(problem.quantized(1.0)), problem.x, problem.y,
                                      epsilons=0.1)


def test_the_first_fooling_iterate_is_returned(problem: Problem) -> None:
    """After a huge step the last iterate may be classified correctly again."""
    model = problem.linear()
    weak = problem.margin < 0.02 * problem.eps
    x = problem.x.clone()
    wrong = problem.y.clone()
    wrong[~weak] = 1 - wrong[~weak]  # misclassified from the start
    found = PGD("ce", 5, norm=problem.norm, noise=0.0).run(
        FoolboxModel(model, Threat()), x, fb.criteria.Misclassification(wrong),
        epsilon=problem.eps)
    assert torch.equal(found[~weak], x[~weak])
