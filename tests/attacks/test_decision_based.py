"""Decision-based attacks: queries, starting points, and errors of the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import pytest
import torch
from boundary_oracle import QUERIES, Scaled, found, name, problem_of
from torch import Tensor, nn

from quantguard.attacks import Boundary, HopSkipJump, PixelModel
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.mark.parametrize("attack", QUERIES, ids=name)
def test_queries_leave_no_trace_and_need_no_gradient(attack: Any, untouched: Untouched) -> None:
    problem = problem_of(attack, 4)
    model = problem.linear()
    pixels = PixelModel(model, Threat())
    with untouched(model):
        found(attack, pixels, problem.x, problem.y)
    assert pixels.gradients == 0
    assert 0.5 * attack.steps < pixels.queries / len(problem.x) <= attack.steps


def test_the_step_of_hopskipjump_does_not_shrink_with_the_batch() -> None:
    problem = problem_of(HopSkipJump("l2"), 20)
    x = problem.x[:4] + 0.01 * problem.w.view(1, 1, 6, 6).sign()
    model = fb.PyTorchModel(problem.linear(), (0, 1), device="cpu")
    rows = fb.attacks.base.ep.astensor(x)

    def lengths(attack: Any, x: Any, y: Tensor) -> Tensor:
        judge = lambda points: fb.attacks.base.ep.astensor(  # noqa: E731
            model(points).raw.argmax(1) != y)
        radius = fb.attacks.base.ep.astensor(torch.full((len(x),), 0.1))
        step: Tensor = attack.approximate_gradients(judge, x, 100, radius).raw
        return step.flatten(1).norm(dim=1)

    plain = lengths(fb.attacks.HopSkipJumpAttack(), rows, problem.y[:4])
    assert abs(plain.norm() - 1) < 1e-4  # the length of the whole batch
    torch.testing.assert_close(
        lengths(HopSkipJump("l2"), rows[:1], problem.y[:1]), torch.ones(1))


def test_hopskipjump_terminates_with_bounds_0_to_255() -> None:
    class OutOfQueries(Exception):
        pass

    class Limited(nn.Module):
        def __init__(self, model: nn.Module, most: int) -> None:
            super().__init__()
            self.model, self.left = model, most

        def forward(self, x: Tensor) -> Tensor:
            self.left -= len(x)
            if self.left < 0:
                raise OutOfQueries
            out: Tensor = self.model(x)
            return out

    problem = problem_of(HopSkipJump("l2"), 20)
    x, y = 255 * problem.x[-1:], problem.y[-1:]
    model = Scaled(problem.linear(), 0, 255).eval()
    limited = Limited(model, 5000).eval()
    with pytest.raises(OutOfQueries):  # it would never end; one iteration takes about 200 queries
        fb.attacks.HopSkipJumpAttack(steps=1).run(
            fb.PyTorchModel(limited, (0, 255), device="cpu"), x,
            fb.criteria.Misclassification(y))
    result = found(HopSkipJump("l2", 1000), Limited(model, 1000).eval(), x, y, (0, 255))
    assert model(result).argmax(1) != y


class Blind(nn.Module):
    """Predicts class 0 for all noise, so that images of class 0 have no starting point."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        noise = x.flatten(1).std(1, keepdim=True) > 0.1
        out: Tensor = torch.where(noise, torch.tensor([1.0, 0.0]), self.model(x))
        return out


@pytest.mark.filterwarnings("ignore:LinearSearchBlendedUniformNoiseAttack failed")
def test_one_image_without_a_start_does_not_end_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(Boundary(), 8)
    model = Blind(problem.linear()).eval()
    start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=10)
    for plain in (fb.attacks.BoundaryAttack(start, 5), fb.attacks.HopSkipJumpAttack(start, 1)):
        with pytest.raises(ValueError, match="init_attack failed"):
            plain.run(fb.PyTorchModel(model, (0, 1), device="cpu"), problem.x,
                      fb.criteria.Misclassification(problem.y))
    monkeypatch.setattr(torch, "rand", uniform_noise)  # full contrast only
    for attack in (Boundary(400), HopSkipJump("l2", 400)):
        result = found(attack, model, problem.x, problem.y)
        changed = (result != problem.x).flatten(1).any(1)
        assert torch.equal(changed, problem.y == 1) and changed.any() and not changed.all()


_rand = torch.rand


def uniform_noise(*size: Any, **options: Any) -> Tensor:
    flat = len(size[0]) > 1 and all(n == 1 for n in size[0][1:])
    return torch.ones(size[0]) if flat else _rand(*size, **options)


def test_a_start_is_found_if_full_contrast_noise_is_all_one_class() -> None:
    problem = problem_of(HopSkipJump("l2"), 8)
    model = Blind(problem.linear()).eval()
    x, y = problem.x[problem.y == 0], problem.y[problem.y == 0]
    result = found(HopSkipJump("l2", 1000), model, x, y)
    with torch.no_grad():
        assert (model(result).argmax(1) != y).all()


@pytest.mark.parametrize("attack", QUERIES, ids=name)
def test_a_model_with_random_outputs_raises_nothing(attack: Any) -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.randn(len(x), 2) + torch.tensor([1.0, 0.0])

    x = torch.rand(5, 1, 6, 6)
    result = found(attack, Random().eval(), x, torch.zeros(5, dtype=torch.long))
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("error", [ValueError, AssertionError])
@pytest.mark.parametrize("attack", QUERIES, ids=name)
def test_an_error_of_the_model_is_not_taken_for_foolboxs(attack: Any, error: Any) -> None:
    class Failing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.calls += 1
            if Failing.calls > 20:
                raise error("mine")
            return torch.stack([x.flatten(1).mean(1) < 0.55, x.flatten(1).mean(1) > 0.45], 1) * 1.0

    with pytest.raises(error, match="mine"):
        found(attack, Failing().eval(), torch.full((1, 1, 6, 6), 0.2),
              torch.zeros(1, dtype=torch.long))
