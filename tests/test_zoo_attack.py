"""ZOO: it finds what can be found within its queries, and nothing where differences are 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import Entry, FoolboxModel, PixelModel
from quantguard.attacks import zoo as room
from quantguard.attacks._foolbox import fb
from quantguard.attacks.losses import margin
from quantguard.attacks.zoo import ZOO, Differences
from quantguard.errors import SpecError
from quantguard.spec import Threat

# 36 pixels, a quarter at a time
OPTIONS: dict[str, Any] = {"steps": 20, "coordinates": 9}
QUERIES = 20 * 19 + 1


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=120)


class Spy(nn.Module):
    """Keep what a model was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        result: Tensor = self.model(x)
        return result


def found(problem: Problem, model: nn.Module, attack: Differences,
          rows: slice = slice(None)) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model, Threat(problem.norm, problem.eps)),
                                problem.x[rows], fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps)
    return result


def distance(x: Tensor, center: Tensor, norm: str) -> Tensor:
    delta = (x - center).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def broken(problem: Problem, model: nn.Module, attack: Differences) -> Tensor:
    """Return which images are broken; every candidate is legal, and none is broken outside eps."""
    x = found(problem, model, attack)
    assert x.shape == problem.x.shape and x.dtype == problem.x.dtype
    assert distance(x, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        fooled = model(x).argmax(1) != problem.y
    assert not fooled[problem.margin >= problem.eps].any()
    return fooled


def assert_finds(problem: Problem, attack: Differences, queries: int) -> None:
    """The oracle: 95 % of the images inside eps are broken by so many queries an image."""
    model = PixelModel(problem.linear(), Threat(problem.norm, problem.eps))
    fooled = broken(problem, model, attack)
    assert fooled[problem.margin < problem.eps].float().mean() >= 0.95
    assert model.queries <= queries * len(problem.x) and model.gradients == 0


def break_it(room: Any, attack: Differences, breaking: str, patch: pytest.MonkeyPatch) -> None:
    """Make a twin that the oracle must reject."""
    if breaking == "sign":
        original = room.height
        patch.setattr(room, "height", lambda z, y: -original(z, y))
    elif breaking == "projection":
        patch.setattr(room, "project", lambda x, center, eps, norm, bounds: x.clamp(*bounds))
    else:
        search, scale = attack._search, {"half eps": 0.5, "eps ignored": 3.0}[breaking]
        patch.setattr(attack, "_search", lambda m, x, y, eps: search(m, x, y, scale * eps))


BREAKINGS = ("sign", "projection", "half eps", "eps ignored")


def test_it_breaks_a_linear_model_up_to_its_margin(problem: Problem) -> None:
    assert_finds(problem, ZOO(problem.norm, **OPTIONS), QUERIES)


@pytest.mark.parametrize("breaking", BREAKINGS)
def test_the_oracle_rejects_a_broken_one(problem: Problem, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    attack = ZOO(problem.norm, **OPTIONS)
    break_it(room, attack, breaking, monkeypatch)
    with pytest.raises(AssertionError):
        assert_finds(problem, attack, QUERIES)


def test_the_oracle_rejects_a_second_moment_for_each_coordinate_in_l2(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to a corner of the cube, which is not where the ball comes nearest."""
    monkeypatch.setattr(room, "ascend", lambda gradient, norm: gradient.sign() / 6)
    with pytest.raises(AssertionError):
        assert_finds(Problem("l2", n=120), ZOO("l2", **OPTIONS), QUERIES)


def test_differences_over_a_little_are_masked_by_a_staircase(problem: Problem) -> None:
    """The artefact: nothing is found with h = 1e-4, and more the further differences reach."""
    model = problem.staircase(width=100.0)
    assert torch.equal(found(problem, model, ZOO(problem.norm, **OPTIONS)), problem.x)
    counts = [int(broken(problem, model, ZOO(problem.norm, rel_h=h, **OPTIONS)).sum())
              for h in (0.25, 0.5, 1.0)]
    assert 0 < counts[0] < counts[1] < counts[2]


def test_the_reach_is_in_pixels_or_over_eps(problem: Problem) -> None:
    for attack, reach in ((ZOO(problem.norm, 1), 1e-4), (ZOO(problem.norm, 1, h=0.01), 0.01),
                          (ZOO(problem.norm, 1, rel_h=0.5), problem.eps / 2)):
        spy = Spy(problem.linear())
        found(problem, spy, attack, slice(100, 101))
        asked = (spy.seen[1] - problem.x[100]).flatten(1)
        assert torch.allclose(asked.abs().amax(1), torch.tensor(reach), rtol=1e-2)
        assert ((asked != 0).sum(1) == 1).all()


def test_each_coordinate_comes_once_before_any_comes_again(problem: Problem) -> None:
    spy = Spy(problem.linear())
    found(problem, spy, ZOO(problem.norm, 8, coordinates=10, h=0.01, rate=1e-6), slice(100, 101))
    moved = torch.cat([(x - problem.x[100]).flatten(1).abs() > 5e-3 for x in spy.seen])
    moved = moved[moved.any(1)]
    assert len(moved) == 2 * 72  # twice 36, the last part of a pass being smaller
    first, second = moved[:72].sum(0), moved[72:].sum(0)
    assert (first == 2).all() and (second == 2).all()
    assert not torch.equal(moved[:72], moved[72:])  # in another order


def test_the_slopes_are_those_of_the_model() -> None:
    problem = Problem("l2", n=20)
    attack = ZOO("l2", 1, coordinates=36, rate=1.0)
    standing = problem.margin > problem.eps
    step = (found(problem, problem.linear(), attack) - problem.x).flatten(1)[standing]
    up = (1 - 2 * problem.y[standing]).unsqueeze(1) * problem.w
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


def test_an_image_that_fell_costs_nothing_more(problem: Problem) -> None:
    model = PixelModel(problem.linear(), Threat())
    wrong = fb.criteria.Misclassification(1 - problem.y)
    x = ZOO(problem.norm, **OPTIONS).run(FoolboxModel(model), problem.x, wrong, epsilon=0.1)
    assert model.queries == len(problem.x) and torch.equal(x, problem.x)


class Ridge(nn.Module):
    """The margin is highest, and below 0, on a hyperplane close by, which a long step passes."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.line = problem.linear()

    def forward(self, x: Tensor) -> Tensor:
        height = -1 - self.line(x)[:, :1].abs()
        return torch.cat([torch.zeros_like(height), height], 1)


def test_what_stands_is_returned_where_it_came_nearest(problem: Problem) -> None:
    model, y = Ridge(problem).eval(), torch.zeros_like(problem.y)
    attack = ZOO(problem.norm, 3, coordinates=36, rate=3.0)
    x = attack.run(FoolboxModel(model), problem.x, fb.criteria.Misclassification(y),
                   epsilon=problem.eps)
    with torch.no_grad():
        before, after = (margin(model(points), y) for points in (problem.x, x))
    assert (after >= before).all() and (after > before).any() and (after < -1).all()


def test_an_image_depends_on_its_seed_and_not_on_its_neighbours(problem: Problem) -> None:
    model, options = problem.linear(), {"steps": 6, "coordinates": 9}
    whole = found(problem, model, ZOO(problem.norm, **options))
    torch.manual_seed(1)
    for rows, batch in ((slice(40, 50), None), (slice(40, 41), None), (slice(40, 50), 5)):
        part = found(problem, model, ZOO(problem.norm, batch=batch, **options), rows)
        # differences over 1e-4 turn the rounding of a product's order into a thousandth of a step
        assert torch.allclose(part, whole[rows], atol=2e-2 * problem.eps)
    assert torch.equal(whole, found(problem, model, ZOO(problem.norm, **options)))
    other = found(problem, model, ZOO(problem.norm, seed=1, **options))
    assert not torch.allclose(other, whole, atol=2e-2 * problem.eps)


def test_no_trace_is_left(problem: Problem, untouched: Callable[
        [nn.Module], AbstractContextManager[None]]) -> None:
    model = problem.staircase(1.0)
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


@pytest.mark.parametrize(("options", "said"), [
    ({"norm": "l1"}, "l1"), ({"steps": 0}, "at least 1"), ({"coordinates": 0}, "at least 1"),
    ({"h": 0.0}, "above 0"), ({"h": -1.0}, "above 0"), ({"rel_h": 0.0}, "above 0"),
    ({"rate": 0.0}, "above 0"), ({"h": float("nan")}, "above 0"), ({"batch": 1}, "at least 2"),
    ({"h": 0.1, "rel_h": 1.0}, "exclude")])
def test_impossible_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ZOO(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        ZOO().run(FoolboxModel(problem.linear()), problem.x,
                  fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
