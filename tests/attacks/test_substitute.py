"""Substitute: it learns from predicted classes only, transfers, and stays in the ball."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

from quantguard.attacks import FoolboxModel, PixelModel
from quantguard.attacks import substitute as substitute_module
from quantguard.attacks.substitute import Substitute
from quantguard.core.errors import DataError, SpecError
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

# Share of the images with a margin below eps that the substitute breaks at least.
SHARES = {("linf", "features"): 0.9, ("l2", "features"): 0.8,
          ("linf", "images"): 0.75, ("l2", "images"): 0.7}
SMALL: dict[str, Any] = {"limit": 800, "rounds": 2}


class Halves:
    """A linear problem whose images are split between the attacker and the test."""

    def __init__(self, norm: str, kind: str = "features") -> None:
        self.problem, self.norm, self.eps = Problem(norm), norm, Problem(norm, 2).eps
        x = self.problem.x.flatten(1) if kind == "features" else self.problem.x
        self.mine, self.x, self.y = x[::2], x[1::2], self.problem.y[1::2]
        self.inside = self.problem.margin[1::2] < self.eps
        self.share = SHARES[norm, kind]
        self.model = self.problem.linear()

    def run(self, attack: Substitute, rows: slice = slice(None)) -> Tensor:
        found: Tensor = attack.run(
            FoolboxModel(self.model), self.x[rows], fb.criteria.Misclassification(self.y[rows]),
            epsilon=self.eps)
        return found


def fitted(halves: Halves, **options: Any) -> Substitute:
    attack = Substitute(norm=halves.norm, **{**SMALL, **options})
    attack.fit(FoolboxModel(halves.model), halves.mine)
    return attack


def assert_transfers(halves: Halves, attack: Substitute) -> None:
    """Check that enough images inside eps are broken, none outside, and all points are valid."""
    x = halves.run(attack)
    order = 2 if halves.norm == "l2" else torch.inf
    assert (x - halves.x).flatten(1).norm(order, dim=1).max() <= halves.eps * (1 + 1e-5)
    assert x.min() >= 0 and x.max() <= 1 and x.shape == halves.x.shape
    with torch.no_grad():
        fooled = halves.model(x).argmax(1) != halves.y
    assert fooled[halves.inside].float().mean() >= halves.share
    assert not fooled[~halves.inside].any()


@pytest.fixture(scope="module", params=["linf", "l2"])
def halves(request: pytest.FixtureRequest) -> Halves:
    return Halves(request.param)


@pytest.fixture(scope="module")
def attack(halves: Halves) -> Substitute:
    return fitted(halves)


def test_a_fitted_substitute_transfers(halves: Halves, attack: Substitute) -> None:
    assert_transfers(halves, attack)
    assert attack.agreement > 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_convolutional_substitute_transfers(norm: str) -> None:
    halves = Halves(norm, "images")
    assert_transfers(halves, fitted(halves, limit=1600, rounds=3))


def test_each_loss_transfers_alone(halves: Halves) -> None:
    for loss in ("ce", "margin"):
        assert_transfers(halves, fitted(halves, losses=(loss,)))


@pytest.mark.parametrize("breaking", ["sign", "eps", "projection", "labels"])
def test_the_oracle_rejects_a_broken_one(halves: Halves, attack: Substitute, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    if breaking == "sign":
        ascend = substitute_module.ascend
        monkeypatch.setattr(substitute_module, "ascend",
                            lambda gradient, norm: -ascend(gradient, norm))
    elif breaking == "eps":
        monkeypatch.setattr(halves, "eps", halves.eps)
        maximise = attack._maximise
        monkeypatch.setattr(attack, "_maximise", lambda m, n, x, y, eps, bounds: maximise(
            m, n, x, y, 3 * eps, bounds))
    elif breaking == "projection":
        monkeypatch.setattr(substitute_module, "project",
                            lambda x, center, eps, norm, bounds: x.clamp(*bounds))
    else:
        predict = substitute_module._predict
        monkeypatch.setattr(substitute_module, "_predict", lambda model, x: (
            predict(model, x)[0].flip(0) if isinstance(model, PixelModel)
            else predict(model, x)[0], 2))
        attack = fitted(halves)
        assert attack.agreement < 0.75
    with pytest.raises(AssertionError):
        assert_transfers(halves, attack)


def test_it_agrees_with_a_model_on_digits_it_has_not_seen(cnn: nn.Module, digits: Any,
                                                          untouched: Untouched) -> None:
    images, labels = digits
    attack = Substitute(steps=20, limit=1600, rounds=3)
    fmodel = FoolboxModel(cnn, Threat(eps=0.15))
    with untouched(cnn):
        attack.fit(fmodel, images[:300])
    unseen, y = images[300:], labels[300:]
    with torch.no_grad():
        predicted = cnn(unseen).argmax(1)
        assert attack._net is not None
        agreement = (attack._net(unseen).argmax(1) == predicted).float().mean()
    assert agreement > 0.7 and attack.agreement > 0.6  # one in ten by chance
    right = predicted == y
    queries = fmodel.module.queries
    with untouched(cnn):
        x = attack.run(fmodel, unseen[right], fb.criteria.Misclassification(y[right]),
                       epsilon=0.15)
    assert fmodel.module.gradients == 0
    assert fmodel.module.queries - queries <= 2 * 21 * int(right.sum())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        noise = unseen[right] + 0.15 * torch.randn(x.shape, generator=generator).sign()
        by_attack, by_noise = ((cnn(z.clamp(0, 1)).argmax(1) != y[right]).float().mean()
                          for z in (x, noise))
    assert by_attack > 0.3 and by_attack > 3 * by_noise


class ClassOnly(nn.Module):
    """Model that returns the predicted class only, one-hot."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


def state(attack: Substitute) -> Tensor:
    assert attack._net is not None
    return torch.cat([p.flatten() for p in attack._net.parameters()])


def test_only_classes_are_queried(halves: Halves, attack: Substitute) -> None:
    model = FoolboxModel(ClassOnly(halves.model).eval())
    by_class = Substitute(norm=halves.norm, **SMALL)
    by_class.fit(model, halves.mine)
    assert torch.equal(state(by_class), state(attack)) and by_class.agreement == attack.agreement
    assert model.module.gradients == 0
    # a tenth of 200 is the holdout; the training images are 180 * 4
    assert model.module.queries == 180 * 4 + 20
    few = Substitute(norm=halves.norm, limit=200, rounds=4)
    few.fit(model, halves.mine)
    assert model.module.queries == 180 * 4 + 20 + 200 + 20


def test_fitting_is_deterministic_and_draws_nothing_global(halves: Halves, attack: Substitute,
                                                           untouched: Untouched) -> None:
    torch.manual_seed(5)
    with untouched(halves.model):
        again = Substitute(norm=halves.norm, **SMALL)
        order = torch.randperm(len(halves.mine), generator=torch.Generator().manual_seed(1))
        again.fit(FoolboxModel(halves.model), halves.mine[order])
    assert torch.equal(state(again), state(attack))
    assert torch.equal(halves.run(again), halves.run(attack))
    again.fit(FoolboxModel(halves.model), halves.mine)  # from the beginning
    assert torch.equal(state(again), state(attack))
    assert not torch.equal(state(fitted(halves, seed=1)), state(attack))


def test_an_image_does_not_depend_on_its_neighbours(halves: Halves, attack: Substitute) -> None:
    whole = halves.run(attack)
    for rows in (slice(10, 30), slice(17, 18)):
        torch.testing.assert_close(halves.run(attack, rows), whole[rows], rtol=0, atol=1e-6)


def test_settings_do_not_change_when_it_is_fitted(halves: Halves) -> None:
    fresh = Substitute()
    settings = {k: v for k, v in vars(fresh).items() if not k.startswith("_")}
    assert settings == {
        "steps": 40, "losses": ("ce", "margin"), "norm": "linf", "rel_step": 0.1, "noise": 1.0,
        "rounds": 4, "step": 0.1, "epochs": 5, "limit": 6400, "seed": 0}
    fresh.epochs = 1
    fresh.fit(FoolboxModel(halves.model), halves.mine[:20])
    assert settings | {"epochs": 1} == {
        k: v for k, v in vars(copy.deepcopy(fresh)).items() if not k.startswith("_")}


def test_a_substitute_that_is_not_fitted_is_refused(halves: Halves) -> None:
    attack = Substitute()
    with pytest.raises(SpecError, match=r"Call fit\(model, images\)"):
        halves.run(attack)
    with pytest.raises(SpecError, match=r"Call fit\(model, images\)"):
        _ = attack.agreement
    with pytest.raises(DataError, match="images to fit a substitute on"):
        attack.fit(FoolboxModel(halves.model), 300 * halves.mine)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (12,), (1, 1, 1), (2, 20, 1), (4, 7),
                                   (2, 70, 66)])
def test_any_shape_and_bounds(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    x = 255 * torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    y = model(x).argmax(1)
    fmodel = FoolboxModel(model, Threat(norm, 10, (0, 255)))
    for mine in (x, x[:1]):
        attack = Substitute(5, norm=norm, rounds=2, epochs=1)
        attack.fit(fmodel, mine)
        assert 0 <= attack.agreement <= 1
    result = attack.run(fmodel, x, fb.criteria.Misclassification(y), epsilon=10.0)
    order = 2 if norm == "l2" else torch.inf
    assert result.shape == x.shape and not torch.equal(result, x)
    assert (result - x).flatten(1).norm(order, dim=1).max() <= 10 * (1 + 1e-5)
    assert result.min() >= 0 and result.max() <= 255
    assert attack.distance == (fb.distances.l2 if norm == "l2" else fb.distances.linf)


def test_every_pixel_of_a_large_image_matters() -> None:
    net = substitute_module.Net(torch.Size((1, 131, 97)), 3, (0.0, 1.0))
    x = torch.rand(1, 1, 131, 97, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None and (x.grad != 0).float().mean() > 0.8


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "at least 1"), ({"epochs": 0}, "at least 1"), ({"limit": 0}, "at least 1"),
    ({"rounds": -1}, "0 or more"), ({"losses": ()}, "ce, margin"),
    ({"losses": ("ce", "dlr")}, "ce, margin"), ({"norm": "l1"}, "linf, l2"),
    ({"rel_step": 0.0}, "above 0"), ({"noise": 1.5}, "0 to 1"), ({"step": -0.1}, "0 to 1")])
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Substitute(**options)


def test_targeted_is_refused(halves: Halves, attack: Substitute) -> None:
    with pytest.raises(SpecError, match="untargeted"):
        attack.run(FoolboxModel(halves.model), halves.x,
                   fb.criteria.TargetedMisclassification(halves.y), epsilon=0.1)
