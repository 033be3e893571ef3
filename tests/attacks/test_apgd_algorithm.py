"""APGD: its iterates, step sizes and checkpoints are those of the paper's algorithm."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import foolbox as fb
import pytest
import torch
from oracle import Problem, distance
from torch import Tensor, nn

from quantguard.attacks import APGD, FoolboxModel, PixelModel
from quantguard.attacks import apgd as apgd_module
from quantguard.attacks import gradient_attack as base_module
from quantguard.attacks.apgd import checkpoints
from quantguard.core.specs import Threat
from quantguard.nn.contexts import soften

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, n=200)


def attacked(problem: Problem, model: nn.Module, attack: APGD, rows: slice = slice(None),
             **kwargs: Any) -> Tensor:
    result: Tensor = attack.run(FoolboxModel(model), problem.x[rows],
                                fb.criteria.Misclassification(problem.y[rows]),
                                epsilon=problem.eps, **kwargs)
    return result


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


def paper_iterates(net: nn.Module, x0: Tensor, label: Tensor, eps: float, norm: str,
                 steps: int) -> tuple[list[Tensor], set[str]]:
    """Return the iterates of algorithm 1 for one image (1, 12), and which conditions were met."""
    def ball(x: Tensor) -> Tensor:
        d = x - x0
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1.0, eps / max(float(d.norm()), 1e-9))
        return (x0 + d).clamp(0, 1)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x).float(), label)

    def f(x: Tensor) -> float:
        return loss(x.detach()).item()

    def uphill(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        return g.sign() if norm == "linf" else g / g.norm()

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [-(-round(100 * q) * steps // 100) for q in p[:-1]]
    eta = 2 * eps
    met: set[str] = set()
    x = [x0, ball(x0 + eta * uphill(x0))]
    iterates = list(x)  # x^(k+1) may be reset to the best point after it was judged
    x_max = max(x, key=f)
    rises, f_mark, halved = int(f(x[1]) > f(x[0])), f(x[0]), False
    for k in range(1, steps):
        z = ball(x[k] + eta * uphill(x[k]))
        x.append(ball(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1])))
        iterates.append(x[k + 1])
        rises += f(x[k + 1]) > f(x[k])
        x_max = max(x_max, x[k + 1], key=f)
        if k + 1 in w:
            few = rises < 0.75 * (k + 1 - w[w.index(k + 1) - 1])
            stuck = not halved and f_mark == f(x_max)
            met |= {"1" if few else "2"} if few or stuck else set()
            rises, f_mark, halved = 0, f(x_max), few or stuck
            if halved:
                eta, x[k + 1] = eta / 2, x_max
    return iterates, met


class RecordingBestFound(base_module.BestFound):
    """Records the judged points, and continues when all images are broken."""

    judged: ClassVar[list[Tensor]] = []

    def judge(self, x: Tensor, logits: Tensor) -> None:
        self.judged.append(x)
        super().judge(x, logits)
        self.already_fooled.zero_()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of points that an APGD judges, filled while it runs."""
    monkeypatch.setattr(apgd_module, "BestFound", RecordingBestFound)
    RecordingBestFound.judged.clear()
    return RecordingBestFound.judged


def test_iterates_are_those_of_algorithm_1(judged: list[Tensor]) -> None:
    net, halvings = small_net(), set()
    x = torch.rand(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    for norm, eps in (("linf", 0.2), ("l2", 1.0)):
        judged.clear()
        APGD(norm=norm, noise=0.0).run(
            FoolboxModel(net), x, fb.criteria.Misclassification(labels), epsilon=eps)
        for i in range(len(x)):
            expected, met = paper_iterates(net, x[i:i + 1], labels[i:i + 1], eps, norm, 50)
            halvings |= met
            torch.testing.assert_close(torch.stack([at[i] for at in judged]), torch.cat(expected),
                                       atol=1e-7, rtol=0)
    assert halvings == {"1", "2"}


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_steps_are_halved_by_the_softened_loss_at_one_sharpness(loss: str,
                                                              judged: list[Tensor]) -> None:
    """The hard loss of these images never rises, and the softened loss drops with sharpness.

    At a single sharpness it rises at every step: none is halved before the edge of the ball.
    """
    problem = Problem("linf", n=40)
    unreachable = slice(21, 40)
    attacked(problem, problem.quantized(width=1.0),
             APGD(loss, sharpness=(0.5, 5), rel_step=0.025, noise=0.0),
             unreachable)
    for step, x in enumerate(judged):
        moved = distance(x, problem.x[unreachable], "linf") / problem.eps
        torch.testing.assert_close(moved, torch.full_like(moved, min(1, 0.025 * step)),
                                   atol=1e-3, rtol=0)


def test_sharpness_is_constant_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, sharpness = Problem("linf", n=40), []

    def noting(module: nn.Module, k: float, **options: Any) -> Any:
        sharpness.append(k)
        return soften(module, k, **options)

    monkeypatch.setattr(base_module, "soften", noting)
    attacked(problem, problem.quantized(width=1.0), APGD(steps=50, sharpness=(2, 16)))
    marks = checkpoints(50)
    expected = []
    for start, end in itertools.pairwise([*marks, 50]):
        k = 2 * 8 ** (start / marks[-1])
        # a checkpoint's gradient is of the sharpness before it; then the best point is re-evaluated
        expected += [k] * (end - start + (end < 50))
    assert sharpness == pytest.approx(expected) and sharpness[-1] == pytest.approx(16)


def test_steps_shrink_sooner_through_the_softened_model() -> None:
    plain, softened = APGD(), APGD(sharpness=(2, 16))
    assert (plain.rel_step, plain.rho) == (2, 0.75)
    assert (softened.rel_step, softened.rho) == (1, 0.9)
    assert vars(APGD(rel_step=0.5, rho=0.0, sharpness=(2, 16)))["rho"] == 0.0


def test_forward_passes_are_counted_as_documented(problem: Problem,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "_LEAST", len(problem.x))  # broken images stay in the batch
    n, marks = len(problem.x), len(checkpoints(50)) - 1
    for options, queries in (({}, 51), ({"sharpness": (2, 16)}, 50 + 51 + marks)):
        model = PixelModel(problem.quantized(width=1.0), Threat(problem.norm, problem.eps))
        attacked(problem, model, APGD(norm=problem.norm, **options))
        assert (model.gradients, model.queries) == (50 * n, queries * n)
    model = PixelModel(problem.linear(), Threat(problem.norm, problem.eps))
    # a float model equals its softened model
    attacked(problem, model, APGD(norm=problem.norm, sharpness=(2, 16)))
    assert model.queries == 51 * n
