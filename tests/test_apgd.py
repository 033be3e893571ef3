"""APGD: it finds what can be found, by the paper's algorithm, and watches what it climbs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import foolbox as fb
import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel, PixelModel
from quantguard.attacks import apgd as room
from quantguard.attacks import pgd as pgd_room
from quantguard.attacks.apgd import APGD, checkpoints
from quantguard.attacks.losses import dlr, image_losses, margin
from quantguard.contexts import soften
from quantguard.errors import SpecError
from quantguard.spec import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


class Unlikely(nn.Module):
    """Add four classes that never win, so that logits have what DLR divides by."""

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


def distance(x: Tensor, center: Tensor, norm: str) -> Tensor:
    delta = (x - center).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def assert_finds(problem: Problem, model: nn.Module, attack: APGD) -> None:
    """The oracle: 99 % of the images inside eps are broken, none outside, all candidates legal."""
    x = attacked(problem, model, attack)
    assert x.shape == problem.x.shape and x.dtype == problem.x.dtype
    assert distance(x, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        fooled = model(x).argmax(1) != problem.y
    inside = problem.margin < problem.eps
    assert fooled[inside].float().mean() >= 0.99 and not fooled[~inside].any()


# --- what can be found ---


@pytest.mark.parametrize("options", [
    {"loss": "ce"}, {"loss": "margin"}, {"loss": "dlr"}, {"noise": 0.0}, {"mode": "ste"},
    {"twin": (2, 16)}, {"loss": "margin", "target": 1}, {"loss": "dlr", "target": 1},
    {"loss": "dlr", "twin": (4, 64)}, {"rel_step": 0.5}], ids=str)
@pytest.mark.parametrize("classes", [2, 6])
def test_it_breaks_a_model_up_to_its_margin(problem: Problem, options: dict[str, Any],
                                            classes: int) -> None:
    attack = APGD(steps=50, norm=problem.norm, **options)
    for model in (problem.linear(), problem.staircase(width=100.0)):
        assert_finds(problem, model.append(Unlikely()) if classes > 2 else model, attack)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_through_the_twin_it_climbs_where_the_hard_loss_is_flat(problem: Problem,
                                                                loss: str) -> None:
    """No image lies in the window: ramp's gradient is 0, and the hard loss never rises."""
    model = problem.staircase(width=0.03)
    options: dict[str, Any] = {"loss": loss, "norm": problem.norm, "noise": 0.0}
    assert torch.equal(attacked(problem, model, APGD(**options)), problem.x)
    assert_finds(problem, model, APGD(twin=(0.2, 2), **options))


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
    monkeypatch.setattr(room, name, breaking(getattr(room, name)))
    with pytest.raises(AssertionError):
        assert_finds(problem, problem.linear(), APGD(norm=problem.norm))


def test_the_oracle_rejects_one_that_ignores_eps(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_finds(problem, problem.linear(), EpsIgnored(norm=problem.norm))


# --- the paper's algorithm ---


def test_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(50) == [0, 11, 21, 29, 35, 40, 44, 47]
    assert checkpoints(1) == [0] and checkpoints(2) == [0, 1] and checkpoints(3) == [0, 1, 2]


def small_net() -> nn.Module:
    """Return a smooth network of 5 classes on 12 features, in double."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 5)).double()
    for parameter in net.parameters():
        parameter.data *= 2
    return net.eval()


def by_the_paper(net: nn.Module, x0: Tensor, label: Tensor, eps: float, norm: str,
                 steps: int) -> tuple[list[Tensor], set[str]]:
    """Return what algorithm 1 looks at for one image (1, 12), written anew, and conditions met."""
    def ball(x: Tensor) -> Tensor:
        d = x - x0
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1.0, eps / max(float(d.norm()), 1e-9))
        return (x0 + d).clamp(0, 1)

    def climbed(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x).float(), label)

    def f(x: Tensor) -> float:
        return climbed(x.detach()).item()

    def uphill(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(climbed(x), x)
        return g.sign() if norm == "linf" else g / g.norm()

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [-(-round(100 * q) * steps // 100) for q in p[:-1]]
    eta = 2 * eps
    met: set[str] = set()
    x = [x0, ball(x0 + eta * uphill(x0))]
    seen = list(x)  # x^(k+1) may be put back to the best, after it was looked at
    x_max = max(x, key=f)
    rises, f_mark, halved = int(f(x[1]) > f(x[0])), f(x[0]), False
    for k in range(1, steps):
        z = ball(x[k] + eta * uphill(x[k]))
        x.append(ball(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1])))
        seen.append(x[k + 1])
        rises += f(x[k + 1]) > f(x[k])
        x_max = max(x_max, x[k + 1], key=f)
        if k + 1 in w:
            few = rises < 0.75 * (k + 1 - w[w.index(k + 1) - 1])
            stuck = not halved and f_mark == f(x_max)
            met |= {"1" if few else "2"} if few or stuck else set()
            rises, f_mark, halved = 0, f(x_max), few or stuck
            if halved:
                eta, x[k + 1] = eta / 2, x_max
    return seen, met


class Noting(pgd_room.Kept):
    """Note what is judged; go on when all have fallen."""

    looked: ClassVar[list[Tensor]] = []

    def judge(self, x: Tensor, logits: Tensor) -> None:
        self.looked.append(x)
        super().judge(x, logits)
        self.fallen.zero_()


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return what an APGD judges, growing as it climbs."""
    monkeypatch.setattr(room, "Kept", Noting)
    Noting.looked.clear()
    return Noting.looked


def test_it_looks_at_what_algorithm_1_looks_at(looked: list[Tensor]) -> None:
    net, halvings = small_net(), set()
    x = torch.rand(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    for norm, eps in (("linf", 0.2), ("l2", 1.0)):
        looked.clear()
        APGD(norm=norm, noise=0.0).run(
            FoolboxModel(net), x, fb.criteria.Misclassification(labels), epsilon=eps)
        for i in range(len(x)):
            expected, met = by_the_paper(net, x[i:i + 1], labels[i:i + 1], eps, norm, 50)
            halvings |= met
            torch.testing.assert_close(torch.stack([at[i] for at in looked]), torch.cat(expected),
                                       atol=1e-7, rtol=0)
    assert halvings == {"1", "2"}


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_steps_are_halved_by_what_is_climbed_at_one_sharpness(loss: str,
                                                              looked: list[Tensor]) -> None:
    """Out of reach the hard loss never rises, and at each sharpness the twin's is lower.

    At a single sharpness it rises at every step: none is halved until the edge of the ball.
    """
    problem = Problem("linf", n=40)
    out = slice(21, 40)
    attacked(problem, problem.staircase(width=1.0),
             APGD(loss, twin=(0.5, 5), rel_step=0.025, noise=0.0), out)
    for step, x in enumerate(looked):
        moved = distance(x, problem.x[out], "linf") / problem.eps
        torch.testing.assert_close(moved, torch.full_like(moved, min(1, 0.025 * step)),
                                   atol=1e-3, rtol=0)


def test_sharpness_is_constant_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, sharpness = Problem("linf", n=40), []

    def noting(module: nn.Module, k: float, **options: Any) -> Any:
        sharpness.append(k)
        return soften(module, k, **options)

    monkeypatch.setattr(pgd_room, "soften", noting)
    attacked(problem, problem.staircase(width=1.0), APGD(steps=50, twin=(2, 16)))
    marks = checkpoints(50)
    expected = []
    for start, end in itertools.pairwise([*marks, 50]):
        k = 2 * 8 ** (start / marks[-1])
        # the gradient at a checkpoint is of the period before it; then the best is seen anew
        expected += [k] * (end - start + (end < 50))
    assert sharpness == pytest.approx(expected) and sharpness[-1] == pytest.approx(16)


def test_through_the_twin_steps_shrink_sooner() -> None:
    papers, twins = APGD(), APGD(twin=(2, 16))
    assert (papers.rel_step, papers.rho) == (2, 0.75) and (twins.rel_step, twins.rho) == (1, 0.9)
    assert vars(APGD(rel_step=0.5, rho=0.0, twin=(2, 16)))["rho"] == 0.0


def test_passes_are_as_many_as_said(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgd_room, "_LEAST", len(problem.x))  # also what has fallen is climbed
    n, marks = len(problem.x), len(checkpoints(50)) - 1
    for options, queries in (({}, 51), ({"twin": (2, 16)}, 50 + 51 + marks)):
        model = PixelModel(problem.staircase(width=1.0), Threat(problem.norm, problem.eps))
        attacked(problem, model, APGD(norm=problem.norm, **options))
        assert (model.gradients, model.queries) == (50 * n, queries * n)
    model = PixelModel(problem.linear(), Threat(problem.norm, problem.eps))
    attacked(problem, model, APGD(norm=problem.norm, twin=(2, 16)))  # a float model is its own
    assert model.queries == 51 * n


# --- whose result it is ---


@pytest.mark.parametrize("options", [{}, {"twin": (2, 16), "loss": "dlr", "target": 1}])
def test_an_image_does_not_depend_on_its_neighbours(problem: Problem,
                                                    options: dict[str, Any]) -> None:
    model = problem.staircase(width=1.0).append(Unlikely())
    attack = APGD(steps=20, norm=problem.norm, **options)
    whole = attacked(problem, model, attack)
    part = attacked(problem, model, attack, slice(80, 120))
    torch.testing.assert_close(part, whole[80:120])
    torch.manual_seed(5)
    assert torch.equal(attacked(problem, model, attack), whole)
    other = APGD(steps=20, norm=problem.norm, seed=1, **options)
    assert not torch.equal(attacked(problem, model, other), whole)


def test_what_stands_is_returned_where_it_came_nearest(problem: Problem) -> None:
    model, standing = problem.linear(), problem.margin > problem.eps
    x = attacked(problem, model, APGD(norm=problem.norm))[standing]
    with torch.no_grad():
        reached = margin(model(x), problem.y[standing])
    dual = problem.w.abs().sum() if problem.norm == "linf" else problem.w.norm()
    torch.testing.assert_close(reached, -2 * dual * (problem.margin[standing] - problem.eps),
                               atol=2e-3, rtol=0)


def test_a_restart_starts_where_it_is_told(problem: Problem) -> None:
    model = problem.linear()
    fell = attacked(problem, model, APGD(norm=problem.norm))
    for restart in (True, False):
        attack = APGD(steps=1, rel_step=1e-6, noise=0.0, norm=problem.norm, restart=restart)
        x = attacked(problem, model, attack, starting_points=fell)
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


class Exploding(nn.Module):
    """Raise at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("options", [{}, {"twin": (2, 16)}, {"mode": "sigmoid(4)"}], ids=str)
@pytest.mark.parametrize("calls", [1, 4, 1000])
def test_it_leaves_no_trace_even_when_the_model_fails(options: dict[str, Any], calls: int,
                                                      untouched: Untouched) -> None:
    problem = Problem("linf", 30)
    model = problem.staircase(width=1.0).append(Exploding(calls))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    fails = pytest.raises(ZeroDivisionError) if calls < 1000 else nullcontext()
    with untouched(model), fails:
        attacked(problem, model, APGD(steps=5, **options))
    assert not problem.x.requires_grad


# --- the loss ---


def test_dlr_is_the_papers() -> None:
    z, y = torch.tensor([[1.0, 5.0, 3.0, 2.0], [4.0, 0.0, 1.0, 2.0]]), torch.tensor([1, 3])
    assert dlr(z, y).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert dlr(z, y, torch.tensor([2, 0])).tolist() == pytest.approx([-2 / 3.5, 2 / 3.5])
    assert image_losses(z, y, "dlr").tolist() == dlr(z, y).tolist()


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize("aimed", [False, True])
def test_dlr_says_what_is_misclassified_and_has_a_gradient(classes: int, aimed: bool) -> None:
    z = torch.randn(300, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(300) % classes
    target = (y + 1 + torch.arange(300) // classes % (classes - 1)) % classes if aimed else None
    value = dlr(z, y, target)
    assert torch.equal(value > 0, margin(z, y, target) > 0)
    if classes > 2:
        torch.testing.assert_close(dlr(50 * z + 7, y, target), value, atol=1e-3, rtol=1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    ahead = z.detach().amax(1) == z.detach().gather(1, y[:, None])[:, 0]
    # behind already, nothing need pull; a right answer must never lie flat
    assert (gradient[ahead].abs().amax(1) > 1e-3).all()


def test_equal_logits_are_no_division_by_zero() -> None:
    for classes in (2, 3, 5):
        z = torch.zeros(2, classes, requires_grad=True)
        value = dlr(z, torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert (value == 0).all() and torch.isfinite(gradient).all()


# --- what cannot be meant ---


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": "scaled"}, "ce, margin, dlr"), ({"steps": 0}, "at least 1"),
    ({"target": 1}, "margin, dlr"), ({"loss": "dlr", "target": -1}, "rank from 1"),
    ({"noise": 1.5}, "0 to 1"), ({"rho": 1.1}, "rho=1.1"), ({"rel_step": 0.0}, "positive"),
    ({"norm": "l1"}, "linf, l2")])
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        APGD(**options)


def test_targeted_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        APGD(steps=2).run(FoolboxModel(problem.linear()), problem.x,
                          fb.criteria.TargetedMisclassification(problem.y), epsilon=0.1)
