"""The evaluator: worst case per image, reproducible results, and a model that stays unchanged."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_suites import (
    EPS,
    ONES,
    Bright,
    Digits,
    Stub,
    Untouched,
    X,
    batches,
    cheap,
    grey,
    measured,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from quantguard.attacks import PGD
from quantguard.attacks.base import fb
from quantguard.core.errors import DataError, SpecError
from quantguard.core.specs import Threat
from quantguard.evaluation.results import Evaluation


@pytest.fixture(scope="module")
def result_l2(quantized: nn.Module, digits: Digits) -> Evaluation:
    return measured(quantized, batches(digits, 100), Threat("l2", 0.5), suite=cheap("l2"))


def test_the_worst_case_is_the_intersection_over_attacks(result: Evaluation) -> None:
    survived = result.correct.copy()
    for attack in result.attacks:
        assert not (attack.broken & ~attack.attacked).any()
        assert not (result.survived & attack.broken).any()
        survived &= ~attack.broken
        assert result.survived.sum() <= (result.correct & ~attack.broken).sum()
    assert np.array_equal(survived, result.survived)
    assert 0 < result.survived.sum() < result.correct.sum()
    assert result.robust_accuracy == result.survived.sum() / 100
    assert np.array_equal(result.surviving("noise", "fgsm", "pgd", "cw", "softened"), survived)
    assert np.array_equal(result.surviving(), result.correct)


def test_attacks_with_a_column_run_on_every_correct_image_and_others_on_survivors(
        result: Evaluation) -> None:
    survivors = result.correct.copy()
    for attack in result.attacks:
        everywhere = attack.settings["everywhere"]
        assert np.array_equal(attack.attacked, result.correct if everywhere else survivors)
        assert attack.queries >= attack.attacked.sum() > 0
        survivors &= ~attack.broken


@pytest.mark.parametrize(("name", "norm", "eps"), [("result", "linf", EPS),
                                                   ("result_l2", "l2", 0.5)])
def test_adversarials_lie_in_the_ball_and_are_really_misclassified(
        name: str, norm: str, eps: float, request: pytest.FixtureRequest, quantized: nn.Module,
        digits: Digits) -> None:
    result: Evaluation = request.getfixturevalue(name)
    x, found = digits[0][:100], torch.from_numpy(result.adversarials)
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    broken = torch.from_numpy(result.correct & ~result.survived)
    assert broken.any() and torch.equal(found[~broken], x[~broken])
    with torch.no_grad():
        assert (quantized(found[broken]).argmax(1) != digits[1][:100][broken]).all()


def test_a_minimum_norm_attacks_own_success_is_beside_its_column_and_not_in_it(
        result: Evaluation) -> None:
    for attack in result.attacks:
        assert (attack.own_success is None) == (attack.label != "C&W")
    carlini = next(a for a in result.attacks if a.label == "C&W")
    assert carlini.own_success is not None and carlini.own_success >= carlini.broken.sum()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_masks_do_not_depend_on_the_loaders_batch_size(size: int, result: Evaluation,
                                                       quantized: nn.Module,
                                                       digits: Digits) -> None:
    other = measured(quantized, batches(digits, 100, size))
    assert np.array_equal(other.survived, result.survived)
    assert np.array_equal(other.adversarials, result.adversarials)
    for one, two in zip(other.attacks, result.attacks, strict=True):
        assert np.array_equal(one.broken, two.broken)


def test_masks_do_not_depend_on_order_or_on_the_other_images(result: Evaluation,
                                                             quantized: nn.Module,
                                                             digits: Digits) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = measured(quantized, [(digits[0][order], digits[1][order])])
    assert np.array_equal(shuffled.survived, result.survived[order.numpy()])
    first = measured(quantized, batches(digits, 100), images=30)
    assert np.array_equal(first.survived, result.survived[:30])


class Normalised(nn.Module):
    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.tensor([mean]), torch.tensor([std])

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1))


def test_a_normalised_loader_and_a_raw_one_attack_the_same_images(quantized: nn.Module,
                                                                  digits: Digits) -> None:
    mean, std = 0.3, 0.4
    model = copy.deepcopy(quantized)
    with torch.no_grad():  # so that the model classifies normalised images well
        model[0].weight.mul_(std)
    pixels, y = (digits[0][:60] * 255).round() / 255, digits[1][:60]
    raw = measured(Normalised(model, mean, std), [(pixels, y)])
    model_input = measured(model, [((pixels - mean) / std, y)],
                     Threat(eps=EPS, mean=(mean,), std=(std,)))
    assert raw.image_hash == model_input.image_hash
    assert np.array_equal(raw.correct, model_input.correct)
    assert np.array_equal(raw.survived, model_input.survived)
    assert np.array_equal(raw.adversarials, model_input.adversarials)


def test_pixels_just_outside_the_bounds_are_clipped(quantized: nn.Module,
                                                    digits: Digits) -> None:
    x = digits[0][:20] + torch.where(digits[0][:20] > 0.5, 5e-5, -5e-5)
    result = measured(quantized, [(x, digits[1][:20])])
    assert result.adversarials is not None
    assert result.adversarials.min() >= 0 and result.adversarials.max() <= 1


def test_the_same_seed_gives_the_same_evaluation(quantized: nn.Module, digits: Digits) -> None:
    suite = [fb.attacks.LinfPGD(steps=3), PGD("ce", 3)]  # Foolbox's draws from torch's numbers
    torch.manual_seed(1)
    first = measured(quantized, batches(digits, 40), suite=suite, seed=3)
    torch.manual_seed(2)
    second = measured(quantized, batches(digits, 40), suite=suite, seed=3)
    assert np.array_equal(first.adversarials, second.adversarials)
    assert first.suite == "list" and first.seed == 3


def test_no_eps_breaks_nothing_and_a_hopeless_model_is_0(cnn: nn.Module, digits: Digits) -> None:
    nothing = measured(cnn, batches(digits, 30), Threat(eps=0))
    assert np.array_equal(nothing.survived, nothing.correct) and nothing.correct.any()
    with torch.no_grad():
        wrong = (cnn(digits[0][:30]).argmax(1) + 1) % 10
    hopeless = measured(cnn, [(digits[0][:30], wrong)])
    assert hopeless.clean_accuracy == hopeless.robust_accuracy == 0
    assert hopeless.verdict == "resolved" and "0 of 30" in str(hopeless)


def test_adversarials_are_clipped_to_the_threat_before_they_count() -> None:
    levels = (0.2, 0.39, 0.41, 0.45, 0.7)
    result = measured(Bright(), grey(*levels), suite=[Stub(10.0)])
    assert result.survived.tolist() == [True, True, False, False, True]
    assert torch.allclose(torch.tensor(result.adversarials[:, 0, 0, 0]),
                          torch.tensor([0.2, 0.39, 0.51, 0.55, 0.7]))


def test_an_attack_that_returns_nan_breaks_nothing() -> None:
    result = measured(Bright(), grey(0.1, 0.2, 0.9), suite=[Stub(float("nan"))])
    assert result.survived.all()
    assert np.isfinite(result.adversarials).all()


def test_the_users_model_is_untouched(quantized: nn.Module, digits: Digits,
                                      untouched: Untouched) -> None:
    model = copy.deepcopy(quantized).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    loader = DataLoader(TensorDataset(digits[0][:40], digits[1][:40]), batch_size=16, shuffle=True)
    with untouched(model):
        measured(model, loader, device="cpu")
    with untouched(model), pytest.raises(DataError):
        measured(model, [(digits[0][:5].expand(-1, 3, -1, -1), digits[1][:5])])


@pytest.mark.parametrize(("options", "message"), [
    ({"suite": "fast"}, "'fast' is unknown"), ({"suite": []}, "no attack"),
    ({"images": 0}, "at least 1")])
def test_impossible_settings(options: dict[str, Any], message: str, cnn: nn.Module) -> None:
    with pytest.raises(SpecError, match=message):
        measured(cnn, [(X, ONES)], **options)


def test_an_unknown_device_is_a_spec_error(cnn: nn.Module, untouched: Untouched) -> None:
    with untouched(cnn), pytest.raises(SpecError, match="nowhere"):
        measured(cnn, [(X, ONES)], device="nowhere")
