"""Square: it finds what can be found, stays in the ball, and asks no gradient."""

from __future__ import annotations

import foolbox as fb
import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel, PixelModel, Square
from quantguard.attacks import square as room
from quantguard.errors import SpecError
from quantguard.spec import Threat

QUERIES = 1500


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem("linf", n=100)


def found(problem: Problem, model: nn.Module, attack: Square, rows: slice = slice(None)) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model), problem.x[rows],
                                fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps)
    return result


def assert_finds(problem: Problem, model: nn.Module, attack: Square) -> None:
    """The oracle: 95 % of the images inside eps are broken, none outside, all candidates legal."""
    x = found(problem, model, attack)
    assert (x - problem.x).abs().max() <= problem.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        fooled = model(x).argmax(1) != problem.y
    inside = problem.margin < problem.eps
    assert fooled[inside].float().mean() >= 0.95 and not fooled[~inside].any()


def test_it_breaks_a_linear_model_up_to_its_margin(problem: Problem) -> None:
    assert_finds(problem, problem.linear(), Square(QUERIES))


@pytest.mark.parametrize("breaking", ["sign", "eps", "projection"])
def test_the_oracle_rejects_a_broken_one(problem: Problem, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    attack = Square(QUERIES)
    if breaking == "sign":
        original = room.margin
        monkeypatch.setattr(room, "margin", lambda z, y: -original(z, y))
    else:
        search, scale = attack._search, 0.5 if breaking == "eps" else 2.0
        monkeypatch.setattr(attack, "_search", lambda m, x, y, eps: search(m, x, y, scale * eps))
    with pytest.raises(AssertionError):
        assert_finds(problem, problem.linear(), attack)


def test_no_gradient_is_asked_and_queries_are_counted(problem: Problem) -> None:
    model = PixelModel(problem.linear(), Threat(eps=problem.eps))
    found(problem, model, Square(40))
    assert model.gradients == 0 and model.queries <= 40 * len(problem.x)


def test_an_image_does_not_depend_on_its_neighbours(problem: Problem) -> None:
    whole = found(problem, problem.linear(), Square(60))
    assert torch.equal(whole[10:30], found(problem, problem.linear(), Square(60), slice(10, 30)))
    other = found(problem, problem.linear(), Square(60, seed=1))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (36,), (2, 2, 20, 1)[1:]])
def test_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    result = Square(30).run(FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.05)
    assert result.shape == x.shape and (result - x).abs().max() <= 0.05 + 1e-6
    assert not torch.equal(result, x)


@pytest.mark.parametrize("options", [{"steps": 1}, {"p": 0.0}, {"p": 1.5}])
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="at least 2"):
        Square(**options)  # type: ignore[arg-type]


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        Square(5).run(FoolboxModel(problem.linear()), problem.x,
                      fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)


