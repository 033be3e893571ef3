"""ZOO: it breaks all it can within its queries, and nothing where differences are 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from differences import BREAKINGS, Spy, assert_finds, break_it, broken, found
from oracle import Problem, distance
from torch import Tensor, nn

from quantguard.attacks import Entry, FoolboxModel, PixelModel
from quantguard.attacks import zoo as zoo_module
from quantguard.attacks.base import fb
from quantguard.attacks.losses import margin
from quantguard.attacks.zoo import ZOO
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat

# 36 pixels, a quarter at a time
OPTIONS: dict[str, Any] = {"steps": 20, "coordinates": 9}
QUERIES = 20 * 19 + 1


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=120)


def test_it_breaks_a_linear_model_up_to_its_margin(problem: Problem) -> None:
    assert_finds(problem, ZOO(problem.norm, **OPTIONS), QUERIES)


@pytest.mark.parametrize("breaking", BREAKINGS)
def test_the_oracle_rejects_a_broken_one(problem: Problem, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    attack = ZOO(problem.norm, **OPTIONS)
    break_it(attack, breaking, monkeypatch)
    with pytest.raises(AssertionError):
        assert_finds(problem, attack, QUERIES)


def test_the_oracle_rejects_a_second_moment_for_each_coordinate_in_l2(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to a corner of the cube, not to the nearest point of the boundary."""
    monkeypatch.setattr(zoo_module, "ascend", lambda gradient, norm: gradient.sign() / 6)
    with pytest.raises(AssertionError):
        assert_finds(Problem("l2", n=120), ZOO("l2", **OPTIONS), QUERIES)


def test_small_differences_are_masked_by_a_quantizer(problem: Problem) -> None:
    """Nothing is broken with h = 1e-4, and more with a larger h."""
    model = problem.quantized(width=100.0)
    assert torch.equal(found(problem, model, ZOO(problem.norm, **OPTIONS)), problem.x)
    counts = [int(broken(problem, model, ZOO(problem.norm, rel_h=h, **OPTIONS)).sum())
              for h in (0.25, 0.5, 1.0)]
    assert 0 < counts[0] < counts[1] < counts[2]


def test_h_is_in_pixels_or_over_eps(problem: Problem) -> None:
    for attack, reach in ((ZOO(problem.norm, 1), 1e-4), (ZOO(problem.norm, 1, h=0.01), 0.01),
                          (ZOO(problem.norm, 1, rel_h=0.5), problem.eps / 2)):
        spy = Spy(problem.linear())
        found(problem, spy, attack, slice(100, 101))
        queried = (spy.seen[1] - problem.x[100]).flatten(1)
        assert torch.allclose(queried.abs().amax(1), torch.tensor(reach), rtol=1e-2)
        assert ((queried != 0).sum(1) == 1).all()


def test_each_coordinate_is_used_once_before_any_is_repeated(problem: Problem) -> None:
    spy = Spy(problem.linear())
    found(problem, spy, ZOO(problem.norm, 8, coordinates=10, h=0.01, rate=1e-6), slice(100, 101))
    moved = torch.cat([(x - problem.x[100]).flatten(1).abs() > 5e-3 for x in spy.seen])
    moved = moved[moved.any(1)]
    assert len(moved) == 2 * 72  # twice 36; the last chunk of a sweep is smaller
    first, second = moved[:72].sum(0), moved[72:].sum(0)
    assert (first == 2).all() and (second == 2).all()
    assert not torch.equal(moved[:72], moved[72:])  # in another order


def test_the_slopes_are_those_of_the_model() -> None:
    problem = Problem("l2", n=20)
    attack = ZOO("l2", 1, coordinates=36, rate=1.0)
    survivors = problem.margin > problem.eps
    step = (found(problem, problem.linear(), attack) - problem.x).flatten(1)[survivors]
    up = (1 - 2 * problem.y[survivors]).unsqueeze(1) * problem.w
    assert torch.nn.functional.cosine_similarity(step, up).min() > 0.999


def test_queries_stay_within_the_bounds_and_forwards_within_their_size() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 1, 4, 4).round()  # every pixel at a bound
    spy = Spy(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval())
    for options in ({"rel_h": 1.0}, {"h": 0.3}, {}):
        attack = ZOO("linf", 5, coordinates=7, batch=6, **options)  # type: ignore[arg-type]
        attack.run(FoolboxModel(spy), x, fb.criteria.Misclassification(spy(x).argmax(1)),
                   epsilon=0.2)
    assert all(seen.min() >= 0 and seen.max() <= 1 for seen in spy.seen)
    assert max(len(seen) for seen in spy.seen) == 6


def test_a_broken_image_takes_no_more_queries(problem: Problem) -> None:
    model = PixelModel(problem.linear(), Threat())
    wrong = fb.criteria.Misclassification(1 - problem.y)
    x = ZOO(problem.norm, **OPTIONS).run(FoolboxModel(model), problem.x, wrong, epsilon=0.1)
    assert model.queries == len(problem.x) and torch.equal(x, problem.x)


class Ridge(nn.Module):
    """Margin that is highest, and negative, on a near hyperplane, which a long step overshoots."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.line = problem.linear()

    def forward(self, x: Tensor) -> Tensor:
        height = -1 - self.line(x)[:, :1].abs()
        return torch.cat([torch.zeros_like(height), height], 1)


def test_survivors_are_returned_at_their_largest_margin(problem: Problem) -> None:
    model, y = Ridge(problem).eval(), torch.zeros_like(problem.y)
    attack = ZOO(problem.norm, 3, coordinates=36, rate=3.0)
    x = attack.run(FoolboxModel(model), problem.x, fb.criteria.Misclassification(y),
                   epsilon=problem.eps)
    with torch.no_grad():
        before, after = (margin(model(points), y) for points in (problem.x, x))
    assert (after >= before).all() and (after > before).any() and (after < -1).all()


def test_an_image_depends_on_the_seed_and_not_on_its_neighbours(problem: Problem) -> None:
    model, options = problem.linear(), {"steps": 6, "coordinates": 9}
    whole = found(problem, model, ZOO(problem.norm, **options))
    torch.manual_seed(1)
    for rows, batch in ((slice(40, 50), None), (slice(40, 41), None), (slice(40, 50), 5)):
        part = found(problem, model, ZOO(problem.norm, batch=batch, **options), rows)
        # differences over 1e-4 amplify the rounding of products to a thousandth of a step
        assert torch.allclose(part, whole[rows], atol=2e-2 * problem.eps)
    assert torch.equal(whole, found(problem, model, ZOO(problem.norm, **options)))
    other = found(problem, model, ZOO(problem.norm, seed=1, **options))
    assert not torch.allclose(other, whole, atol=2e-2 * problem.eps)


def test_no_trace_is_left(problem: Problem, untouched: Callable[
        [nn.Module], AbstractContextManager[None]]) -> None:
    model = problem.quantized(1.0)
    with untouched(model):
        found(problem, model, ZOO(problem.norm, 2, rel_h=0.5))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (36,), (2, 20, 1)])
def test_any_shape(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    result = ZOO(norm, 3).run(FoolboxModel(model), x, fb.criteria.Misclassification(y),
                              epsilon=0.05)
    assert result.shape == x.shape and distance(result, x, norm).max() <= 0.05 + 1e-6
    assert not torch.equal(result, x)


def test_usable_through_a_plain_foolbox_call(problem: Problem) -> None:
    attack = ZOO(problem.norm, **OPTIONS)
    _, clipped, fooled = attack(FoolboxModel(problem.linear()), problem.x, problem.y,
                                epsilons=[0.0, problem.eps / 2, problem.eps])
    assert torch.equal(clipped[0], problem.x)
    assert fooled[0].sum() == 0 < fooled[1].sum() < fooled[2].sum()


def test_its_settings_are_plain_json() -> None:
    settings = Entry("ZOO", ZOO(rel_h=0.5), "black-box").settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["rel_h"] == 0.5 and settings["h"] is None and settings["coordinates"] == 128
    assert ZOO().h == 1e-4 and ZOO(h=0.1).h == 0.1


@pytest.mark.parametrize(("options", "message"), [
    ({"norm": "l1"}, "l1"), ({"steps": 0}, "at least 1"), ({"coordinates": 0}, "at least 1"),
    ({"h": 0.0}, "above 0"), ({"h": -1.0}, "above 0"), ({"rel_h": 0.0}, "above 0"),
    ({"rate": 0.0}, "above 0"), ({"h": float("nan")}, "above 0"), ({"batch": 1}, "at least 2"),
    ({"h": 0.1, "rel_h": 1.0}, "exclude")])
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ZOO(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        ZOO().run(FoolboxModel(problem.linear()), problem.x,
                  fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
