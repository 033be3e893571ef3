"""Foolbox's minimum-norm attacks, bridged: near the optimum, and none of Foolbox's faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import Entry, FoolboxModel, PixelModel
from quantguard.attacks import bridged as room
from quantguard.attacks.bridged import DDN, Boundary, CarliniWagner, DeepFool, HopSkipJump
from quantguard.errors import DataError, SpecError
from quantguard.spec import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

# (attack, how far beyond the nearest boundary it may end, images): of HopSkipJump and Boundary
# after so many queries.
FACTORS = [(CarliniWagner(9, 100), 1.1, 40), (DDN(150), 1.1, 40), (DeepFool("l2"), 1.1, 40),
           (DeepFool("linf"), 1.1, 40), (HopSkipJump("l2", 2000), 1.1, 6),
           (HopSkipJump("linf", 2000), 1.2, 6), (Boundary(3000), 1.5, 1)]
GRADIENT = [CarliniWagner(2, 20), DDN(20), DeepFool("l2"), DeepFool("linf")]
QUERIES = [HopSkipJump("l2", 600), HopSkipJump("linf", 600), Boundary(300)]


def name(value: Any) -> str:
    return f"{type(value).__name__} {value.norm}" if hasattr(value, "norm") else str(value)


def problem_of(attack: Any, n: int = 40) -> Problem:
    """Return a problem without images that lie on the boundary, as good as."""
    problem = Problem(attack.norm, n=n)
    far = problem.margin > 0.1 * problem.eps
    problem.x, problem.y, problem.margin = problem.x[far], problem.y[far], problem.margin[far]
    return problem


def spread(total: int, few: int) -> Tensor:
    return torch.linspace(0, total - 1, few).long()


class Scaled(nn.Module):
    """A model on (low, low + range) that computes what one on (0, 1) does."""

    def __init__(self, model: nn.Module, low: float, width: float) -> None:
        super().__init__()
        self.model, self.low, self.width = model, low, width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - self.low) / self.width)
        return out


def found(attack: Any, model: nn.Module, x: Tensor, y: Tensor,
          bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    threat = Threat(attack.norm, 0.0, bounds)
    result: Tensor = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y))
    return result


def assert_near(attack: Any, factor: float, images: int,
                bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """The oracle: every image is fooled, no nearer than possible and hardly farther."""
    problem = problem_of(attack)
    rows, (low, high) = spread(len(problem.x), images), bounds
    model = Scaled(problem.linear(), low, high - low).eval()
    x, y = low + (high - low) * problem.x[rows], problem.y[rows]
    result = found(attack, model, x, y, bounds)
    assert result.shape == x.shape and result.dtype == x.dtype
    assert result.min() >= low and result.max() <= high
    with torch.no_grad():
        assert (model(result).argmax(1) != y).all()
    order = 2 if attack.norm == "l2" else torch.inf
    ratio = (result - x).flatten(1).norm(order, dim=1) / (high - low) / problem.margin[rows]
    assert ratio.min() >= 1 - 1e-3 and ratio.max() <= factor


@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS, ids=name)
def test_it_ends_next_to_the_boundary(attack: Any, factor: float, images: int) -> None:
    assert_near(attack, factor, images)


@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS[:-1], ids=name)
def test_bounds_change_only_the_unit(attack: Any, factor: float, images: int) -> None:
    assert_near(attack, factor, min(images, 10), (0.0, 255.0))


def test_bounds_need_not_start_at_zero() -> None:
    assert_near(DDN(150), 1.1, 10, (-1.0, 2.0))
    assert_near(HopSkipJump("l2", 1000), 1.2, 3, (-1.0, 2.0))


@pytest.mark.parametrize("breaking", ["estimate", "note", "rescaling"])
@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS[4:6], ids=name)
def test_the_oracle_rejects_a_broken_one(attack: Any, factor: float, images: int, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    if breaking == "estimate":
        original = HopSkipJump.approximate_gradients
        monkeypatch.setattr(HopSkipJump, "approximate_gradients",
                            lambda *arguments: -original(*arguments))
    elif breaking == "note":  # the last point asked, whether it fooled or not
        monkeypatch.setattr(room._Watched, "_note", lambda self, point, pixels, logits: setattr(
            self, "pixels", pixels[-1:]))
    else:
        make = room._Watched.__init__
        monkeypatch.setattr(room._Watched, "__init__",
                            lambda self, m, x, y, bounds, *rest, **more: make(
                                self, m, x, y, (bounds[0], bounds[1] / 2), *rest, **more))
    with pytest.raises(AssertionError):
        assert_near(attack, factor, images)


@pytest.mark.parametrize("attack", GRADIENT[:2] + GRADIENT[2:3], ids=name)
def test_the_oracle_rejects_a_gradient_of_the_wrong_sign(attack: Any) -> None:
    class Flipped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return 2 * logits.detach() - logits

    problem = problem_of(attack)
    result = found(attack, Flipped(problem.linear()).eval(), problem.x, problem.y)
    fooled = problem.linear()(result).argmax(1) != problem.y
    assert fooled.float().mean() < 0.5


def test_images_in_other_bounds_are_judged_as_they_are_returned() -> None:
    """What is returned was judged to the bit: points next to the boundary do not flip back."""
    torch.manual_seed(0)
    x = torch.rand(8, 12)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))
    y, model = model(x).argmax(1), Scaled(model, -0.3, 3.7).eval()
    for attack in (HopSkipJump("l2", 1500), DeepFool("l2"), DDN(60), CarliniWagner(3, 60)):
        result = found(attack, model, -0.3 + 3.7 * x, y, (-0.3, 3.4))
        with torch.no_grad():
            assert (model(result).argmax(1) != y).all()


def test_a_point_is_kept_clear_of_the_boundary() -> None:
    """Judged beside other images, whose number changes the rounding, it still fools."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6400, 5)).eval()
    x = torch.rand(24, 1, 24, 24)
    with torch.no_grad():
        y = model(x).argmax(1)
        result = found(HopSkipJump("linf", 800), model, x, y)
        for n in (8, 12, 24):
            assert (model(result[:n]).argmax(1) != y[:n]).all()


# --- what plain Foolbox does wrong ---


@pytest.mark.parametrize(("attack", "plain"), list(zip(GRADIENT, [
    fb.attacks.L2CarliniWagnerAttack(2, 20), fb.attacks.DDNAttack(steps=20),
    fb.attacks.L2DeepFoolAttack(), fb.attacks.LinfDeepFoolAttack()], strict=True)), ids=name)
def test_no_gradient_is_left_on_parameters_and_no_random_number_drawn(
        attack: Any, plain: Any, untouched: Untouched) -> None:
    problem = problem_of(attack, 12)
    model = problem.linear()
    plain.run(fb.PyTorchModel(model, (0, 1), device="cpu"), problem.x,
              fb.criteria.Misclassification(problem.y))
    assert model[1].weight.grad is not None
    model = problem.linear()
    with untouched(model):
        found(attack, model, problem.x, problem.y)
    assert model[1].weight.grad is None


@pytest.mark.parametrize("attack", QUERIES, ids=name)
def test_queries_leave_no_trace_and_ask_no_gradient(attack: Any, untouched: Untouched) -> None:
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
    assert abs(plain.norm() - 1) < 1e-4  # the whole batch's together
    torch.testing.assert_close(
        lengths(HopSkipJump("l2"), rows[:1], problem.y[:1]), torch.ones(1))


def test_hopskipjump_ends_on_0_to_255() -> None:
    class Tired(Exception):
        pass

    class Limited(nn.Module):
        def __init__(self, model: nn.Module, most: int) -> None:
            super().__init__()
            self.model, self.left = model, most

        def forward(self, x: Tensor) -> Tensor:
            self.left -= len(x)
            if self.left < 0:
                raise Tired
            out: Tensor = self.model(x)
            return out

    problem = problem_of(HopSkipJump("l2"), 20)
    x, y = 255 * problem.x[-1:], problem.y[-1:]
    model = Scaled(problem.linear(), 0, 255).eval()
    limited = Limited(model, 5000).eval()
    with pytest.raises(Tired):  # it would go on for ever; one iteration takes some 200 queries
        fb.attacks.HopSkipJumpAttack(steps=1).run(
            fb.PyTorchModel(limited, (0, 255), device="cpu"), x,
            fb.criteria.Misclassification(y))
    result = found(HopSkipJump("l2", 1000), Limited(model, 1000).eval(), x, y, (0, 255))
    assert model(result).argmax(1) != y


class Blind(nn.Module):
    """See class 0 in all noise: images of class 0 have no start."""

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
    monkeypatch.setattr(torch, "rand", uniform_noise)  # no variation of contrast
    for attack in (Boundary(400), HopSkipJump("l2", 400)):
        result = found(attack, model, problem.x, problem.y)
        changed = (result != problem.x).flatten(1).any(1)
        assert torch.equal(changed, problem.y == 1) and changed.any() and not changed.all()


_rand = torch.rand


def uniform_noise(*size: Any, **options: Any) -> Tensor:
    flat = len(size[0]) > 1 and all(n == 1 for n in size[0][1:])
    return torch.ones(size[0]) if flat else _rand(*size, **options)


def test_a_start_is_found_where_all_noise_of_full_contrast_is_one_class() -> None:
    problem = problem_of(HopSkipJump("l2"), 8)
    model = Blind(problem.linear()).eval()
    x, y = problem.x[problem.y == 0], problem.y[problem.y == 0]
    result = found(HopSkipJump("l2", 1000), model, x, y)
    with torch.no_grad():
        assert (model(result).argmax(1) != y).all()


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_an_image_does_not_depend_on_its_neighbours(attack: Any) -> None:
    problem = problem_of(attack, 5 if isinstance(attack, Boundary) else 9)
    model = problem.staircase(0.03) if isinstance(attack, DDN) else problem.linear()
    torch.manual_seed(0)
    whole = found(attack, model, problem.x, problem.y)
    torch.manual_seed(1)
    for rows in (torch.tensor([2]), torch.tensor([3, 2, 2])):
        part = found(attack, model, problem.x[rows], problem.y[rows])
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6)
    if attack.seed is not None:
        other = type(attack)(**{k: v for k, v in vars(attack).items() if k in (
            "norm", "steps") and not (k == "norm" and isinstance(attack, (DDN, Boundary)))},
            seed=1)
        assert not torch.equal(found(other, model, problem.x, problem.y), whole)


@pytest.mark.parametrize("plain", [
    fb.attacks.HopSkipJumpAttack(steps=2), fb.attacks.BoundaryAttack(steps=100),
    fb.attacks.DDNAttack(steps=20), fb.attacks.L2CarliniWagnerAttack(9, 100, stepsize=0.05)],
    ids=lambda plain: type(plain).__name__)
def test_in_plain_foolbox_it_does(plain: Any) -> None:
    problem = problem_of(CarliniWagner(), 12)
    model: Any = problem.staircase(0.03) if isinstance(plain, fb.attacks.DDNAttack) else \
        problem.linear()
    model = fb.PyTorchModel(model, (0, 1), device="cpu")
    results = []
    for rows in (slice(None), slice(3, 4)):
        torch.manual_seed(0)
        results.append(plain.run(model, problem.x[rows],
                                 fb.criteria.Misclassification(problem.y[rows])))
    assert not torch.allclose(results[0][3:4], results[1], atol=1e-4)


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_pixels_outside_the_bounds_are_named(attack: Any) -> None:
    problem = problem_of(attack, 4)
    with pytest.raises(DataError, match=rf"inputs of {type(attack).__name__}: .*\n.*like 0..255"):
        found(attack, problem.linear(), 255 * problem.x, problem.y)


# --- what is not found ---


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = 0 * x.flatten(1)[:, :2]
        return out + torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_where_nothing_is_found_the_image_comes_back(attack: Any) -> None:
    problem = problem_of(attack, 4)
    y = torch.zeros(len(problem.x), dtype=torch.long)
    assert torch.equal(found(attack, Constant().eval(), problem.x, y), problem.x)
    # and where there is nothing to be done
    assert torch.equal(found(attack, Constant().eval(), problem.x, y + 1), problem.x)


@pytest.mark.parametrize("attack", QUERIES, ids=name)
def test_a_model_that_answers_at_random_ends_nothing(attack: Any) -> None:
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


# --- settings ---


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_settings_are_json_and_a_targeted_criterion_is_refused(attack: Any) -> None:
    settings = Entry("x", attack, "other").settings()
    assert json.loads(json.dumps(settings)) == settings and " at 0x" not in json.dumps(settings)
    assert settings["steps"] == attack.steps and settings["norm"] == attack.norm
    with pytest.raises(SpecError, match="untargeted"):
        attack.run(FoolboxModel(Constant().eval()), torch.rand(2, 1, 6, 6),
                   fb.criteria.TargetedMisclassification(torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 9, 2), (12,)])
def test_any_shape(attack: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    result = found(attack, model, x, y)
    assert result.shape == x.shape and result.min() >= 0 and result.max() <= 1
    with torch.no_grad():
        fooled = model(result).argmax(1) != y
    assert torch.equal(fooled, (result != x).flatten(1).any(1))
    assert fooled.any() and attack.distance == (
        fb.distances.l2 if attack.norm == "l2" else fb.distances.linf)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: CarliniWagner(0), "binary_search_steps=0 must be above 0"),
    (lambda: CarliniWagner(stepsize=-1.0), "stepsize=-1.0"),
    (lambda: DDN(gamma=0.0), "gamma=0.0"), (lambda: DDN(0), "steps=0"),
    (lambda: DeepFool("l1"), "'l1' is unknown"), (lambda: DeepFool(candidates=1), "candidates=1"),
    (lambda: HopSkipJump("l0"), "'l0' is unknown"),
    (lambda: HopSkipJump(steps=100), "at least 256"),
    (lambda: HopSkipJump(evaluations=0), "evaluations=0"), (lambda: Boundary(10), "at least 256"),
    (lambda: Boundary(source_step=0.0), "source_step=0.0")])
def test_impossible_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
