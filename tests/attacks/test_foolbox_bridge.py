"""The bridge to Foolbox's minimum-norm attacks: near the optimum, on any batch and bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import pytest
import torch
from boundary_oracle import (
    FACTORS,
    GRADIENT,
    QUERIES,
    Constant,
    Scaled,
    assert_near,
    found,
    name,
    problem_of,
)
from torch import nn

from quantguard.attacks import (
    DDN,
    Boundary,
    CarliniWagner,
    DeepFool,
    Entry,
    FoolboxModel,
    HopSkipJump,
)
from quantguard.attacks import foolbox_bridge as bridge
from quantguard.core.errors import DataError, SpecError

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS, ids=name)
def test_it_ends_next_to_the_boundary(attack: Any, factor: float, images: int) -> None:
    assert_near(attack, factor, images)


@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS[:-1], ids=name)
def test_bounds_change_only_the_unit(attack: Any, factor: float, images: int) -> None:
    assert_near(attack, factor, min(images, 10), (0.0, 255.0))


def test_bounds_need_not_start_at_zero() -> None:
    assert_near(DDN(150), 1.1, 10, (-1.0, 2.0))
    assert_near(HopSkipJump("l2", 1000), 1.2, 3, (-1.0, 2.0))


@pytest.mark.parametrize("breaking", ["estimate", "record", "rescaling"])
@pytest.mark.parametrize(("attack", "factor", "images"), FACTORS[4:6], ids=name)
def test_the_oracle_rejects_a_broken_one(attack: Any, factor: float, images: int, breaking: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    if breaking == "estimate":
        original = HopSkipJump.approximate_gradients
        monkeypatch.setattr(HopSkipJump, "approximate_gradients",
                            lambda *arguments: -original(*arguments))
    elif breaking == "record":  # record the last point, whether it fooled or not
        monkeypatch.setattr(bridge.RecordedModel, "_record", lambda self, point, pixels, logits:
                            setattr(self, "pixels", pixels[-1:]))
    else:
        make = bridge.RecordedModel.__init__
        monkeypatch.setattr(bridge.RecordedModel, "__init__",
                            lambda self, m, x, y, bounds, *rest, **more: make(
                                self, m, x, y, (bounds[0], bounds[1] / 2), *rest, **more))
    with pytest.raises(AssertionError):
        assert_near(attack, factor, images)


def test_results_in_other_bounds_fool_exactly_as_returned() -> None:
    """Points next to the boundary are judged exactly as returned, and do not flip back."""
    torch.manual_seed(0)
    x = torch.rand(8, 12)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))
    y, model = model(x).argmax(1), Scaled(model, -0.3, 3.7).eval()
    for attack in (HopSkipJump("l2", 1500), DeepFool("l2"), DDN(60), CarliniWagner(3, 60)):
        result = found(attack, model, -0.3 + 3.7 * x, y, (-0.3, 3.4))
        with torch.no_grad():
            assert (model(result).argmax(1) != y).all()


def test_results_fool_in_batches_of_any_size() -> None:
    """The batch size changes the rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6400, 5)).eval()
    x = torch.rand(24, 1, 24, 24)
    with torch.no_grad():
        y = model(x).argmax(1)
        result = found(HopSkipJump("linf", 800), model, x, y)
        for n in (8, 12, 24):
            assert (model(result[:n]).argmax(1) != y[:n]).all()


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_an_image_does_not_depend_on_its_neighbours(attack: Any) -> None:
    problem = problem_of(attack, 5 if isinstance(attack, Boundary) else 9)
    model = problem.quantized(0.03) if isinstance(attack, DDN) else problem.linear()
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
def test_in_plain_foolbox_an_image_depends_on_its_neighbours(plain: Any) -> None:
    problem = problem_of(CarliniWagner(), 12)
    model: Any = problem.quantized(0.03) if isinstance(plain, fb.attacks.DDNAttack) else \
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


@pytest.mark.parametrize("attack", QUERIES + GRADIENT, ids=name)
def test_the_image_is_returned_where_nothing_is_found(attack: Any) -> None:
    problem = problem_of(attack, 4)
    y = torch.zeros(len(problem.x), dtype=torch.long)
    assert torch.equal(found(attack, Constant().eval(), problem.x, y), problem.x)
    # and where the image is misclassified already
    assert torch.equal(found(attack, Constant().eval(), problem.x, y + 1), problem.x)


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
def test_invalid_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
