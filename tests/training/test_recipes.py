"""Recipes: defaults and validation, the inner attacks, the stability term."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantguard.attacks import PixelModel
from quantguard.conversion.converter import convert
from quantguard.core.errors import SpecError
from quantguard.core.specs import QuantSpec, Threat
from quantguard.nn.functional import compiled_kernels as fused
from quantguard.nn.quant_activation import QuantActivation, quantizers
from quantguard.nn.threshold_margin import threshold_margin
from quantguard.training.inner_attack import attacked_images
from quantguard.training.objectives import stability_term
from quantguard.training.recipes import Recipe, recipe_of

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Digits = tuple[Tensor, Tensor]


# --- settings ---


@pytest.mark.parametrize(("name", "steps", "noise", "attacks"), [
    ("clean", 0, 0.0, False), ("pgd", 3, 1.0, True), ("trades", 3, 1.0, True),
    ("nfgsm", 1, 1.0, True)])
def test_each_name_has_its_own_defaults(name: str, steps: int, noise: float,
                                        attacks: bool) -> None:
    recipe = Recipe(name)
    assert (recipe.steps, recipe.noise, recipe.attacks) == (steps, noise, attacks)
    assert all(getattr(recipe, field) is not None for field in (
        "rel_step", "stability", "range_factor", "ema", "threshold_lr", "weight_decay"))
    settings = recipe.to_dict()
    assert json.loads(json.dumps(settings)) == settings and Recipe(**settings) == recipe


@pytest.mark.parametrize(("name", "settings"), [
    ("pgd", {"steps": 0}), ("nfgsm", {"steps": 0}), ("clean", {"steps": 3}),
    ("ibp", {"bit_schedule": (32,)}), ("clean", {"init": "interval", "distill": 0.5})])
def test_settings_that_contradict_each_other_are_refused(name: str,
                                                               settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"recipe {name} "):
        Recipe(name, **settings)


def test_numpy_numbers_are_numbers() -> None:
    recipe = Recipe("pgd", lr=np.float32(1e-3), noise=np.float64(0.5))  # type: ignore[arg-type]
    assert recipe.lr == pytest.approx(1e-3) and recipe.noise == 0.5
    assert json.loads(json.dumps(recipe.to_dict()))["noise"] == 0.5


def test_arguments_override_the_defaults_of_the_name() -> None:
    recipe = Recipe("pgd", steps=7, noise=0.0, stability=0.0, sharpness=(4, 8))
    assert (recipe.steps, recipe.noise, recipe.stability) == (7, 0.0, 0.0)
    assert recipe.sharpness == (4.0, 8.0)
    assert Recipe("pgd", sharpness=()).sharpness == ()
    assert Recipe("pgd", sharpness=5).sharpness == (5.0,)  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [
    ("lr", 0), ("lr", -1e-3), ("lr", math.nan), ("lr", math.inf), ("lr", "1e-3"), ("mix", "a"),
    ("awp", math.inf), ("steps", True), ("box", "all"), ("threshold_lr", 0),
    ("batch_size", 0),
    ("batch_size", 1.5), ("steps", -1), ("steps", 2.5), ("rel_step", -0.1), ("noise", -1.0),
    ("noise", math.nan), ("stability", -1.0), ("weight_decay", -1e-9), ("ema", 1.0), ("ema", -0.1),
    ("sharpness", (0,)), ("sharpness", (3, -1)), ("sharpness", (math.nan,)),
    ("range_factor", 0), ("range_factor", -1.0), ("beta", -1.0), ("awp", -0.1), ("mix", 1.1),
    ("distill", -0.1), ("bit_schedule", (9,)), ("bit_schedule", (0.5,)), ("precision", "float16")])
def test_a_value_out_of_its_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"recipe pgd: {field}="):
        Recipe("pgd", **{field: value})


@pytest.mark.parametrize(("name", "near"), [("pgdd", "'pgd'"), ("nfsgm", "'nfgsm'"),
                                            ("klean", "'clean'")])
def test_an_unknown_recipe_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(SpecError, match=f"did you mean {near}"):
        Recipe(name)
    with pytest.raises(SpecError, match="clean, pgd, trades, nfgsm"):
        Recipe("")


def test_recipe_of_parses_text() -> None:
    recipe = recipe_of("pgd", {"lr": "1e-3", "steps": "5", "sharpness": "3,8", "ema": "0",
                               "batch_size": "32", "bit_schedule": "32,8", "precision": "float32"})
    assert recipe == Recipe("pgd", lr=1e-3, steps=5, sharpness=(3, 8), ema=0.0, batch_size=32,
                            bit_schedule=(32, 8), precision="float32")
    assert recipe_of("pgd", {"sharpness": ""}).sharpness == ()
    assert recipe_of("nfgsm") == Recipe("nfgsm")
    assert recipe_of(recipe) is recipe


@pytest.mark.parametrize(("settings", "message"), [
    ({"step": "3"}, "no field 'step'(.|\n)*'steps'"), ({"qqqq": "3"}, "Fields: awp, batch_size"),
    ({"name": "clean"}, "no field 'name'"), ({"lr": "fast"}, "lr='fast' is not a number"),
    ({"steps": "2.5"}, "steps='2.5' is not a number"),
    ({"sharpness": "3;8"}, "is not a number"), ({"ema": "2"}, "ema=2.0")])
def test_recipe_of_names_malformed_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        recipe_of("pgd", settings)


# --- the inner attack ---


def size(x: Tensor, center: Tensor, norm: str) -> Tensor:
    delta = (x - center).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.7)])
@pytest.mark.parametrize("options", [{}, {"sharpness": ()}, {"noise": 0.0, "steps": 5}], ids=str)
def test_pgd_stays_within_the_ball_and_raises_the_loss(norm: str, eps: float,
                                                        options: dict[str, Any],
                                                        quantized: nn.Module,
                                                        digits: Digits) -> None:
    x, y = digits[0][:64], digits[1][:64]
    found = attacked_images(PixelModel(quantized, Threat()), x, y, Threat(norm, eps),
                  Recipe("pgd", **options))
    assert size(found, x, norm).max() <= eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert loss_of(quantized, found, y) > 2 * loss_of(quantized, x, y)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3)])
def test_nfgsm_stays_within_bounds_and_may_leave_the_ball_by_its_noise(norm: str, eps: float,
                                                                       quantized: nn.Module,
                                                                       digits: Digits) -> None:
    x, y = 0.3 + 0.4 * digits[0][:64], digits[1][:64]  # no bound is met
    for noise in (1.0, 2.0):
        found = attacked_images(PixelModel(quantized, Threat()), x, y, Threat(norm, eps),
                      Recipe("nfgsm", noise=noise))
        assert eps * 1.05 < size(found, x, norm).max() <= (1 + noise) * eps * (1 + 1e-5)
    edge = attacked_images(PixelModel(quantized, Threat()), digits[0][:64], y, Threat(norm, eps),
                 Recipe("nfgsm"))
    assert edge.min() >= 0 and edge.max() <= 1


def test_clean_attacks_nothing(quantized: nn.Module, digits: Digits) -> None:
    assert attacked_images(quantized, digits[0], digits[1], Threat(), Recipe("clean")) is digits[0]


@pytest.mark.parametrize("name", ["pgd", "nfgsm"])
def test_the_inner_attack_changes_nothing_but_the_random_numbers(name: str, quantized: nn.Module,
                                                         digits: Digits,
                                                         untouched: Untouched) -> None:
    """Above all BatchNorm's statistics, although the model is in train mode."""
    model = copy.deepcopy(quantized).train()
    with untouched(model), torch.random.fork_rng():
        attacked_images(
            PixelModel(model, Threat()), *(t[:32] for t in digits), Threat(eps=0.1), Recipe(name)
        )


def test_the_inner_attack_sees_the_model_in_eval_mode(digits: Digits) -> None:
    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x.flatten(1)[:, :10] * 1.0

    model = Spy().train()
    attacked_images(model, digits[0][:4], digits[1][:4], Threat(eps=0.1), Recipe("pgd"))
    assert model.training


# --- the stability term ---


def plain_term(x: Tensor, t: list[float], step: float) -> float:
    """Mean over elements and thresholds of 4 p (1 - p)."""
    total = 0.0
    for z in x.flatten().tolist():
        for threshold in t:
            p = 1 / (1 + math.exp(-8 * (z - threshold) / step))
            total += 4 * p * (1 - p)
    return total / (x.numel() * len(t))


@pytest.mark.parametrize("dynamic", [False, True])
def test_stability_term_is_the_mean_of_the_formula_over_sites(dynamic: bool) -> None:
    first = QuantActivation.from_thresholds([0.5, 1.5, 2.5], 1.0, dynamic=dynamic)
    second = QuantActivation.from_thresholds([0.3], 0.7, dynamic=dynamic)
    model = nn.Sequential(first, second)
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with stability_term(model, 0.25) as term:
        model(x)
        value = term()
    assert isinstance(value, Tensor)
    expected = (plain_term(x, [0.5, 1.5, 2.5], 1.0) + plain_term(first(x), [0.3], 0.7)) / 2
    assert float(value.detach()) == pytest.approx(0.25 * expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.abs().sum() > 0


def test_stability_term_per_channel_uses_each_channels_thresholds() -> None:
    t, steps = [[0.5, 1.0, 2.0], [1.5, 3.0, 3.5]], [1.0, 2.0]
    model = nn.Sequential(QuantActivation.from_thresholds(t, torch.tensor(steps)))
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with stability_term(model, 1.0) as term:
        model(x)
        value = term()
    expected = sum(plain_term(x[:, c], t[c], steps[c]) for c in range(2)) / 2
    assert float(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("size", [7, 96], ids=["eager", "compiled"])
def test_the_stability_terms_gradient_is_that_of_the_formula_and_never_denormal(
        monkeypatch: pytest.MonkeyPatch, size: int, bits: int) -> None:
    monkeypatch.setattr(fused, "WORTH", 2)
    t = torch.arange(2**bits - 1) * 0.4 + 0.2
    x = torch.linspace(-6, 30, 2 * size * size).reshape(2, 1, size, size).requires_grad_()
    value = threshold_margin(x, t, torch.tensor(0.4))
    (gradient,) = torch.autograd.grad(value, x)
    exact = x.detach().double().requires_grad_()
    centers = t.double() if bits <= 4 else \
        t.double()[torch.bucketize(exact.detach(), (t[1:] + t[:-1]).double() / 2)][..., None]
    p = torch.sigmoid((exact[..., None] - centers) * (8 / 0.4))
    expected = (4 * p * (1 - p)).sum() / (x.numel() * len(t))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (slope,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3,
                               atol=1e-5 * float(slope.abs().max()))
    if bits <= 4:
        assert ((gradient == 0) | (gradient.abs() >= torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stability_term_of_other_types_is_that_of_float32(kind: torch.dtype) -> None:
    x = torch.linspace(-1, 3, 2**17).to(kind)
    t, step = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0)
    values, gradients = [], []
    for z in (x, x.float()):
        values.append(float((value := threshold_margin(z.requires_grad_(), t, step)).detach()))
        gradients.append(torch.autograd.grad(value * 1e4, z)[0].float())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def test_stability_term_falls_when_preactivations_leave_the_thresholds() -> None:
    model = nn.Sequential(QuantActivation.from_thresholds([0.5, 1.5, 2.5], 1.0))
    values = []
    for point in (1.5, 1.6, 1.8, 2.0):
        with stability_term(model, 1.0) as term:
            model(torch.full((2, 2), point))
            values.append(float(term()))
    assert values == sorted(values, reverse=True)


def test_stability_term_is_0_without_weight_or_quantizers_and_leaves_no_listener(
        cnn: nn.Module, digits: Digits) -> None:
    model = convert(cnn, QuantSpec(2, True))
    for candidate, weight in ((model, 0.0), (cnn, 1.0)):
        with stability_term(candidate, weight) as term:
            candidate(digits[0][:2])
            assert term() == 0.0
    with pytest.raises(ZeroDivisionError), stability_term(model, 1.0):
        raise ZeroDivisionError
    assert all(m._listener is None for m in quantizers(model).values())


@pytest.mark.parametrize(("name", "settings"), [
    ("trades", {"mix": 0.5}), ("clean", {"noise": 0.5}), ("clean", {"sharpness": (2.0,)}),
    ("pgd", {"growth": (0.1, 0.9)}), ("ibp", {"precision": "bfloat16"})])
def test_an_unused_setting_is_refused(name: str,
                                                          settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"recipe {name} has no {next(iter(settings))}"):
        Recipe(name, **settings)
    assert Recipe("ibp", box=0.5, precision="bfloat16").steps and Recipe("pgd", mix=0.5).mix
