"""harden: its result, the original model, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fine_tuning import THREAT, Digits, Untouched, inner
from hardened_models import hardened, same_state
from torch import nn
from torch.utils.data import DataLoader

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.errors import DataError, QuantguardError, SpecError
from quantguard.core.specs import Threat
from quantguard.data.loader import load_data
from quantguard.nn.quant_activation import quantizers
from quantguard.training.recipes import Recipe


class Named(nn.Sequential):
    """A user's class."""


def test_harden_returns_a_copy_of_the_same_class_and_leaves_the_original(
        cnn: nn.Module, loader: DataLoader[Any], untouched: Untouched) -> None:
    model = Named(*copy.deepcopy(cnn)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    batches = list(loader)
    with untouched(model):
        result = hardened(model, batches, val=batches[:1], epochs=2)
    assert isinstance(result, Named) and result is not model
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in result.named_parameters() if n in flags} == flags
    assert [result.training, result[1].training, result[3].training] == [True, False, True]
    assert torch.equal(result[0].weight, model[0].weight)
    assert not torch.equal(result[3].weight, model[3].weight)
    assert all(p.grad is None for p in result.parameters())
    specs = {(m.spec.bits, m.spec.dynamic) for m in inner(result).values()}
    assert specs == {(2, False)} and len(inner(result)) == 4
    assert quantizers(result)["input_staircase.staircase"].spec.bits == 8
    batch = torch.rand(2, 1, 8, 8)
    assert (result.eval()(batch) - model.eval()(batch)).abs().max() > 0


def test_every_learned_number_moves_and_thresholds_stay_ordered(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.warns(UserWarning, match="Pass val="):  # the last epoch is returned
        result = hardened(cnn, list(loader), recipe=Recipe("pgd", lr=1e-3, threshold_lr=0.05),
                          epochs=2, dynamic=True)
    for module in inner(result).values():
        for parameter in (module.shift, module.log_gaps, module.log_step):
            assert (parameter != 0).all()
        t = module.thresholds
        assert (t[1:] > t[:-1]).all() and t.isfinite().all() and module.step > 0


def test_the_same_seed_gives_the_same_bits_whatever_torchs_random_numbers_are(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    results = []
    for other in (1, 2):
        torch.manual_seed(other)
        results.append(hardened(cnn, loader, seed=5))
    assert same_state(*results)
    assert not same_state(results[0], hardened(cnn, loader, seed=6))


def test_harden_leaves_the_callers_random_numbers(cnn: nn.Module, loader: DataLoader[Any],
                                                  untouched: Untouched) -> None:
    with untouched(cnn):
        hardened(cnn, loader)


def test_a_converted_model_is_trained_as_it_is(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    fixed = qg.convert(cnn, 3)
    result = hardened(fixed, loader)
    assert {(m.spec.bits, m.spec.dynamic) for m in inner(result).values()} == {(3, False)}
    for name, module in quantizers(fixed).items():
        assert torch.equal(module.thresholds, quantizers(result)[name].thresholds)
    again = inner(hardened(fixed, loader, bits=3, dynamic=False))
    assert {m.spec.bits for m in again.values()} == {3}


def test_a_float_control_is_converted_behind_its_input_quantizer(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    control = hardened(cnn, loader, bits=32)
    own = control.quantguard.plan.input  # type: ignore[union-attr]
    for bit_schedule in ((), (32,), (32, 8)):
        recipe = Recipe("pgd", steps=1, lr=1e-3, bit_schedule=bit_schedule)
        result = hardened(control, loader, recipe=recipe, epochs=3, threat=Threat(eps=0.2))
        assert {m.spec.bits for m in inner(result).values()} == {2} and len(inner(result)) == 4
        assert result.quantguard.plan.input == own  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "dynamic", "message"), [
    (3, None, "bits=3 contradicts.*bits=2"), (None, False, "dynamic=False contradicts"),
    (32, None, "bits=32 contradicts"), (2, False, "dynamic=False contradicts")])
def test_bits_that_contradict_the_conversion(bits: int | None, dynamic: bool | None, message: str,
                                             quantized: nn.Module,
                                             loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=message):
        hardened(quantized, loader, bits=bits, dynamic=dynamic)


@pytest.mark.slow
def test_bits_that_do_not_contradict_are_accepted(quantized: nn.Module,
                                                  loader: DataLoader[Any]) -> None:
    assert same_state(hardened(quantized, loader, bits=2, dynamic=True),
                      hardened(quantized, loader))


@pytest.mark.parametrize("bits", [0, 9, 16, -1, 1.5])
def test_impossible_bits(bits: Any, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=f"bits={bits}"):
        hardened(cnn, loader, bits=bits)


def test_32_bits_are_the_float_control(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    result = hardened(cnn, loader, bits=32, epochs=2, recipe=Recipe("pgd", lr=1e-3, input_bits=0))
    assert not quantizers(result) and [type(m) for m in result] == [type(m) for m in cnn]
    assert list(quantizers(hardened(cnn, loader, bits=32))) == ["input_staircase.staircase"]
    assert not quantizers(hardened(cnn, loader, bits=32, threat=Threat("l2", 0.5)))  # Linf's alone
    assert not same_state(result, cnn)
    with pytest.raises(SpecError, match="no learnable thresholds"):
        hardened(cnn, loader, bits=32, train="thresholds")
    with pytest.raises(SpecError, match="no learnable thresholds"):
        hardened(cnn, loader, dynamic=False, train="thresholds")


@pytest.mark.parametrize("settings", [{"lr": 1e-3}, {"weight_decay": 0.0}, {"awp": 0.01}])
def test_settings_of_weights_are_refused_where_thresholds_alone_are_trained(
        settings: dict[str, float], cnn: nn.Module, loader: DataLoader[Any]) -> None:
    recipe = Recipe("clean", **settings)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=f"train='thresholds' has no {next(iter(settings))}: .*\n"
                                        ".*threshold_lr"):
        hardened(cnn, loader, dynamic=True, recipe=recipe, train="thresholds")


def test_wrappers_are_removed(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    assert same_state(hardened(nn.DataParallel(cnn), loader, bits=32),
                      hardened(cnn, loader, bits=32))


@pytest.mark.parametrize("kind", ["nan", "range", "labels", "channels", "size"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_bad_batch_is_named_during_calibration_too(kind: str, place: int, cnn: nn.Module,
                                                             loader: DataLoader[Any]) -> None:
    batches: list[Any] = list(loader)
    val = batches[:1]
    x, y = batches[place]
    batches[place] = {"nan": (torch.where(x > 0.9, torch.nan, x), y), "range": (x * 255, y),
                      "labels": (x, y + 5), "channels": (x.repeat(1, 3, 1, 1), y),
                      "size": (x[..., :5, :5], y)}[kind]
    with pytest.raises(DataError, match=f"batch {place}"):
        hardened(cnn, batches, val=val)


@pytest.mark.parametrize(("loader", "message"), [
    ([], "empty"), (iter([]), "one-shot"), (torch.zeros(2, 1, 8, 8), "not a loader")])
def test_empty_loaders_are_refused(loader: Any, message: str, cnn: nn.Module) -> None:
    with pytest.raises(DataError, match=message):
        hardened(cnn, loader, val=[(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"recipe": "pdg"}, SpecError, "did you mean 'pgd'"), ({"epochs": 0}, SpecError, "epochs=0"),
    ({"train": "none"}, SpecError, "all or thresholds"),
    ({"device": "nowhere"}, SpecError, "nowhere")])
def test_impossible_settings(options: dict[str, Any], error: type[QuantguardError], message: str,
                             cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(error, match=message):
        hardened(cnn, loader, **options)


def test_a_normalised_loader_is_attacked_in_pixels(cnn: nn.Module,
                                                   loader: DataLoader[Any]) -> None:
    batches = [((x - 0.3) / 0.4, y) for x, y in loader]
    result = hardened(cnn, batches, bits=32, val=batches[:1], epochs=2,
                      threat=Threat(eps=0.1, mean=(0.3,), std=(0.4,)))
    assert not same_state(result, cnn)
    with pytest.raises(DataError, match="batch 0.*outside 0..1(.|\n)*mean= and std="):
        hardened(cnn, batches, bits=32, val=batches[:1])


@pytest.mark.slow
def test_adversarial_training_beats_no_training(cnn: nn.Module, digits: Digits) -> None:
    loader = load_data("digits", "train", batch_size=64)
    result = hardened(cnn, loader, bits=32, recipe="pgd", epochs=5)
    figures = [qg.evaluate(model, [digits], THREAT, suite=[PGD("ce", 20)], images=300,
                           progress=False).robust_accuracy for model in (cnn, result)]
    assert figures[1] > figures[0] + 0.15


def test_eps_0_is_refused_by_recipes_that_attack(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match="eps=0 leaves recipe pgd nothing"):
        hardened(cnn, loader, threat=qg.Threat(eps=0))
    hardened(cnn, loader, threat=qg.Threat(eps=0), recipe=Recipe("clean", lr=1e-3))
