"""Square: it breaks models up to their margin, stays in the ball, and needs no gradient."""

from __future__ import annotations

from typing import Any

import foolbox as fb
import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel, PixelModel, Square
from quantguard.attacks import square as square_module
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat

QUERIES = {"linf": 1500, "l2": 2500}


@pytest.fixture(scope="module", params=["linf", pytest.param("l2", marks=pytest.mark.slow)])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=100 if request.param == "linf" else 40)


def square(problem: Problem, steps: int | None = None, seed: int = 0) -> Square:
    return Square(steps or QUERIES[problem.norm], seed=seed, norm=problem.norm)


def found(problem: Problem, model: nn.Module, attack: Square, rows: slice = slice(None)) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model), problem.x[rows],
                                fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps)
    return result


def assert_finds(problem: Problem, model: nn.Module, attack: Square) -> None:
    """Check that 95 % of images inside eps are broken, none outside, and all points are valid."""
    x = found(problem, model, attack)
    order = 2 if problem.norm == "l2" else torch.inf
    assert (x - problem.x).flatten(1).norm(order, dim=1).max() <= problem.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        fooled = model(x).argmax(1) != problem.y
    inside = problem.margin < problem.eps
    assert fooled[inside].float().mean() >= 0.95 and not fooled[~inside].any()


def test_it_breaks_a_linear_model_up_to_its_margin(problem: Problem) -> None:
    assert_finds(problem, problem.linear(), square(problem))


@pytest.mark.parametrize("breaking", ["sign", pytest.param("eps", marks=pytest.mark.slow),
                                      pytest.param("projection", marks=pytest.mark.slow)])
def test_the_oracle_rejects_a_broken_one(problem: Problem, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    attack = square(problem)
    if breaking == "sign":
        original = square_module.margin
        monkeypatch.setattr(square_module, "margin", lambda z, y: -original(z, y))
    else:
        search, scale = attack._search, 0.5 if breaking == "eps" else 2.0
        monkeypatch.setattr(attack, "_search", lambda m, x, y, eps: search(m, x, y, scale * eps))
    with pytest.raises(AssertionError):
        assert_finds(problem, problem.linear(), attack)


def test_no_gradient_is_computed_and_queries_are_counted(problem: Problem) -> None:
    model = PixelModel(problem.linear(), Threat(eps=problem.eps))
    found(problem, model, square(problem, 40))
    assert model.gradients == 0 and model.queries <= 40 * len(problem.x)


def test_an_image_does_not_depend_on_its_neighbours(problem: Problem) -> None:
    attack = square(problem, 60)
    whole = found(problem, problem.linear(), attack)
    assert torch.equal(whole[10:30], found(problem, problem.linear(), attack, slice(10, 30)))
    torch.manual_seed(7)
    assert torch.equal(whole, found(problem, problem.linear(), attack))
    other = found(problem, problem.linear(), square(problem, 60, seed=1))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (36,), (2, 20, 1), (1, 1, 1), (4, 7)])
def test_any_shape(shape: tuple[int, ...], bounds: tuple[float, float], norm: str) -> None:
    torch.manual_seed(0)
    x = bounds[1] * torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    eps = 0.05 * bounds[1]
    result = Square(30, norm=norm).run(FoolboxModel(model, Threat(norm, eps, bounds)), x,
                                       fb.criteria.Misclassification(y), epsilon=eps)
    order = 2 if norm == "l2" else torch.inf
    assert result.shape == x.shape
    assert (result - x).flatten(1).norm(order, dim=1).max() <= eps * (1 + 1e-5)
    assert result.min() >= 0 and result.max() <= bounds[1] and not torch.equal(result, x)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3), (6, 6), (5, 4), (9, 2), (1, 9), (8, 1)])
def test_a_bump_follows_equation_2(size: tuple[int, int]) -> None:
    rows, columns = size
    expected = torch.zeros(size)
    for first, width, sign in ((0, columns // 2, 1), (columns // 2, columns - columns // 2, -1)):
        n = max(rows // 2, width // 2)
        for r in range(1, rows + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - rows // 2 - 1), abs(s - width // 2 - 1))
                expected[r - 1, first + s - 1] = sign * sum(
                    1 / (n + 1 - k) ** 2 for k in range(m + 1))
    torch.testing.assert_close(square_module.bump(*size), expected / expected.norm())


def test_l2_spends_the_whole_norm_and_moves_it_between_windows() -> None:
    """Algorithm 3, line 10: one window gains what another loses, on every channel."""
    torch.manual_seed(0)
    x = torch.full((5, 3, 12, 12), 0.5)
    search = square_module._Bumps(x, 0.3, (0.0, 1.0), lambda *size: torch.rand(5, *size))
    best = search.start()
    for step in range(8):
        fine = step % 4 == 1
        length = (best - x).flatten(2).norm(dim=2)
        torch.testing.assert_close(length.norm(dim=1), torch.full((5,), 0.3))
        trial = search.trial(best, 2.0 if fine else 30.0, step)
        torch.testing.assert_close((trial - x).flatten(2).norm(dim=2), length)
        changed = (trial != best).any(1).flatten(1).sum(1)
        assert changed.min() >= 1 and changed.max() <= 2 * (2 if fine else 30)
        best = trial


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 1}, "at least 2"), ({"p": 0.0}, "at least 2"), ({"p": 1.5}, "at least 2"),
    ({"norm": "l1"}, "linf, l2")])
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Square(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        Square(5).run(FoolboxModel(problem.linear()), problem.x,
                      fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
