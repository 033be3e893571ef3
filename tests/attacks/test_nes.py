"""NES: it breaks all it can within its queries, and nothing where differences are 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from differences import BREAKINGS, Spy, assert_finds, break_it, broken, found
from oracle import Problem, distance
from torch import nn

from quantguard.attacks import Entry, FoolboxModel
from quantguard.attacks.base import fb
from quantguard.attacks.nes import NES
from quantguard.core.errors import SpecError

OPTIONS: dict[str, Any] = {"steps": 60, "samples": 20}
QUERIES = 60 * 41 + 1


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=80)


@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_it_breaks_a_linear_model_up_to_its_margin(problem: Problem, momentum: float) -> None:
    # without momentum more samples are needed: only shrinking steps average the estimates
    options = OPTIONS if momentum else {**OPTIONS, "samples": 80}
    assert_finds(problem, NES(problem.norm, momentum=momentum, **options),
                 QUERIES if momentum else 60 * 161 + 1)


@pytest.mark.parametrize("breaking", BREAKINGS)
def test_the_oracle_rejects_a_broken_one(problem: Problem, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    attack = NES(problem.norm, **OPTIONS)
    break_it(attack, breaking, monkeypatch)
    with pytest.raises(AssertionError):
        assert_finds(problem, attack, QUERIES)


def test_small_differences_are_masked_by_a_quantizer(problem: Problem) -> None:
    """Nothing is broken with h = 1e-4, and more with a larger h."""
    model = problem.quantized(width=100.0)
    options = {"steps": 10, "samples": 20}
    assert torch.equal(found(problem, model, NES(problem.norm, **options)), problem.x)
    counts = [int(broken(problem, model, NES(problem.norm, rel_h=h, **options)).sum())
              for h in (0.25, 0.5, 1.0)]
    assert 0 < counts[0] < counts[1] < counts[2]


def test_h_is_in_pixels_or_over_eps_in_the_norm(problem: Problem) -> None:
    linf = problem.norm == "linf"
    for options, sigma in (({}, 1e-4), ({"h": 0.01}, 0.01),
                           ({"rel_h": 0.5}, problem.eps / 2 / (1 if linf else 6))):
        spy = Spy(problem.linear())
        found(problem, spy, NES(problem.norm, 1, samples=100, **options),  # type: ignore[arg-type]
              slice(70, 71))
        queried = (spy.seen[1] - problem.x[70]).flatten(1)
        assert abs(queried.std() / sigma - 1) < 0.05
        up, down = queried.chunk(2)
        assert torch.allclose(up, -down, atol=1e-6)


def test_the_estimate_converges_to_the_gradient() -> None:
    problem = Problem("l2", n=10)
    attack = NES("l2", 1, samples=3000, rate=1.0)
    survivors = problem.margin > problem.eps
    step = (found(problem, problem.linear(), attack) - problem.x).flatten(1)[survivors]
    up = (1 - 2 * problem.y[survivors]).unsqueeze(1) * problem.w
    assert torch.nn.functional.cosine_similarity(step, up).min() > 0.98


def test_queries_stay_within_the_bounds_and_forwards_within_their_size() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 1, 4, 4).round()  # every pixel at a bound
    spy = Spy(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval())
    y = spy(x).argmax(1)
    NES("linf", 5, samples=7, rel_h=1.0, batch=6).run(
        FoolboxModel(spy), x, fb.criteria.Misclassification(y), epsilon=0.2)
    assert all(seen.min() >= 0 and seen.max() <= 1 for seen in spy.seen)
    assert max(len(seen) for seen in spy.seen) == 6


def test_an_image_depends_on_the_seed_and_not_on_its_neighbours(problem: Problem) -> None:
    model, options = problem.linear(), {"steps": 6, "samples": 10, "rel_h": 0.1}
    whole = found(problem, model, NES(problem.norm, **options))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for rows, batch in ((slice(40, 50), None), (slice(40, 41), None), (slice(40, 50), 6)):
        attack = NES(problem.norm, batch=batch, **options)  # type: ignore[arg-type]
        part = found(problem, model, attack, rows)
        assert torch.allclose(part, whole[rows], atol=1e-2 * problem.eps)
    other = found(problem, model, NES(problem.norm, seed=1, **options))  # type: ignore[arg-type]
    assert not torch.allclose(other, whole, atol=1e-2 * problem.eps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (36,), (2, 20, 1)])
def test_any_shape(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    result = NES(norm, 3).run(FoolboxModel(model), x, fb.criteria.Misclassification(y),
                              epsilon=0.05)
    assert result.shape == x.shape and distance(result, x, norm).max() <= 0.05 + 1e-6
    assert not torch.equal(result, x)


def test_its_settings_are_plain_json() -> None:
    settings = Entry("NES", NES(rel_h=0.5), "black-box").settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["rel_h"] == 0.5 and settings["samples"] == 50 and settings["momentum"] == 0.9


@pytest.mark.parametrize(("options", "message"), [
    ({"norm": "l1"}, "l1"), ({"samples": 0}, "at least 1"), ({"rel_h": -1.0}, "above 0"),
    ({"momentum": 1.0}, "below 1"), ({"momentum": -0.1}, "below 1")])
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        NES(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        NES().run(FoolboxModel(problem.linear()), problem.x,
                  fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
