"""APGD against classifiers whose margins are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import foolbox as fb
import pytest
import torch
from oracle import Exploding, Problem, assert_breaks_up_to_margin, distance
from torch import Tensor, nn

from quantguard.attacks import APGD, FoolboxModel
from quantguard.attacks import apgd as apgd_module
from quantguard.attacks.losses import margin
from quantguard.core.errors import SpecError

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



class Unlikely(nn.Module):
    """Adds four classes that never win, as DLR needs four logits."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z, z.new_tensor([-9.0, -10.0, -11.0, -12.0]).expand(len(z), 4)], 1)


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=200)


def attacked(problem: Problem, model: nn.Module, attack: APGD, rows: slice = slice(None),
             **kwargs: Any) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model), problem.x[rows],
                                fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps, **kwargs)
    return result


@pytest.mark.parametrize("options", [
    {"loss": "ce"}, {"loss": "margin"}, {"loss": "dlr"}, {"noise": 0.0}, {"mode": "ste"},
    {"sharpness": (2, 16)}, {"loss": "margin", "target": 1}, {"loss": "dlr", "target": 1},
    {"loss": "dlr", "sharpness": (4, 64)}, {"rel_step": 0.5}], ids=str)
@pytest.mark.parametrize("classes", [2, 6])
def test_it_breaks_a_model_up_to_its_margin(problem: Problem, options: dict[str, Any],
                                            classes: int) -> None:
    attack = APGD(steps=50, norm=problem.norm, **options)
    for model in (problem.linear(), problem.quantized(width=100.0)):
        model = model.append(Unlikely()) if classes > 2 else model
        assert_breaks_up_to_margin(attack, problem, model)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_the_softened_model_has_a_gradient_where_the_loss_is_flat(problem: Problem,
                                                                loss: str) -> None:
    """No image is in the window: ramp's gradient is 0, and the hard loss never rises."""
    model = problem.quantized(width=0.03)
    options: dict[str, Any] = {"loss": loss, "norm": problem.norm, "noise": 0.0}
    assert torch.equal(attacked(problem, model, APGD(**options)), problem.x)
    assert_breaks_up_to_margin(APGD(sharpness=(0.2, 2), **options), problem, model)


class EpsIgnored(APGD):
    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        return super().run(model, inputs, criterion, epsilon=3 * epsilon)


def _flipped(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda gradient, norm: -original(gradient, norm)


def _unprojected(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, center, eps, norm, bounds: x.clamp(*bounds)


@pytest.mark.parametrize(("name", "breaking"), [("ascend", _flipped), ("project", _unprojected)])
def test_the_oracle_rejects_a_broken_one(problem: Problem, name: str, breaking: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apgd_module, name, breaking(getattr(apgd_module, name)))
    with pytest.raises(AssertionError):
        assert_breaks_up_to_margin(APGD(norm=problem.norm), problem, problem.linear())


def test_the_oracle_rejects_one_that_ignores_eps(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_breaks_up_to_margin(EpsIgnored(norm=problem.norm), problem, problem.linear())


@pytest.mark.parametrize("options", [{}, {"sharpness": (2, 16), "loss": "dlr", "target": 1}])
def test_an_image_does_not_depend_on_its_neighbours(problem: Problem,
                                                    options: dict[str, Any]) -> None:
    model = problem.quantized(width=1.0).append(Unlikely())
    attack = APGD(steps=20, norm=problem.norm, **options)
    whole = attacked(problem, model, attack)
    part = attacked(problem, model, attack, slice(80, 120))
    torch.testing.assert_close(part, whole[80:120])
    torch.manual_seed(5)
    assert torch.equal(attacked(problem, model, attack), whole)
    other = APGD(steps=20, norm=problem.norm, seed=1, **options)
    assert not torch.equal(attacked(problem, model, other), whole)


def test_survivors_are_returned_at_their_largest_margin(problem: Problem) -> None:
    model, survivors = problem.linear(), problem.margin > problem.eps
    x = attacked(problem, model, APGD(norm=problem.norm))[survivors]
    with torch.no_grad():
        reached = margin(model(x), problem.y[survivors])
    dual = problem.w.abs().sum() if problem.norm == "linf" else problem.w.norm()
    torch.testing.assert_close(reached, -2 * dual * (problem.margin[survivors] - problem.eps),
                               atol=2e-3, rtol=0)


def test_a_restart_begins_at_the_starting_points(problem: Problem) -> None:
    model = problem.linear()
    broken_points = attacked(problem, model, APGD(norm=problem.norm))
    for restart in (True, False):
        attack = APGD(steps=1, rel_step=1e-6, noise=0.0, norm=problem.norm, restart=restart)
        x = attacked(problem, model, attack, starting_points=broken_points)
        with torch.no_grad():
            broken = int((model(x).argmax(1) != problem.y).sum())
        assert broken == (int((problem.margin < problem.eps).sum()) if restart else 0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (36,)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_shape(shape: tuple[int, ...], norm: str) -> None:
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    result = APGD("dlr", 5, norm=norm).run(FoolboxModel(model), x,
                                           fb.criteria.Misclassification(y), epsilon=0.05)
    assert result.shape == x.shape and not torch.equal(result, x)
    assert distance(result, x, norm).max() <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize("options", [{}, {"sharpness": (2, 16)}, {"mode": "sigmoid(4)"}], ids=str)
@pytest.mark.parametrize("calls", [1, 4, 1000])
def test_it_leaves_no_trace_even_when_the_model_fails(options: dict[str, Any], calls: int,
                                                      untouched: Untouched) -> None:
    problem = Problem("linf", 30)
    model = problem.quantized(width=1.0).append(Exploding(calls))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    fails = pytest.raises(ZeroDivisionError) if calls < 1000 else nullcontext()
    with untouched(model), fails:
        attacked(problem, model, APGD(steps=5, **options))
    assert not problem.x.requires_grad


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": "scaled"}, "ce, margin, dlr"), ({"steps": 0}, "at least 1"),
    ({"target": 1}, "margin, dlr"), ({"loss": "dlr", "target": -1}, "rank from 1"),
    ({"noise": 1.5}, "0 to 1"), ({"rho": 1.1}, "rho=1.1"), ({"rel_step": 0.0}, "positive"),
    ({"norm": "l1"}, "linf, l2")])
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        APGD(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        APGD(steps=2).run(FoolboxModel(problem.linear()), problem.x,
                          fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
