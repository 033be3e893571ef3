"""When training goes wrong: what is noticed, and where it goes back to."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantguard.core.errors import DataError
from quantguard.core.specs import Threat
from quantguard.nn.quant_activation import QuantActivation
from quantguard.training import trainer
from quantguard.training.objectives import Objective
from quantguard.training.optim import merging
from quantguard.training.recipes import Recipe
from quantguard.training.recovery import collapsed, remedy
from quantguard.training.trainer import fit

ONE = Recipe("nfgsm")


@pytest.mark.parametrize(("clean", "attacked", "own", "first", "wrong"), [
    (0.9, 0.6, 0.65, False, None), (0.9, 0.1, 0.8, False, "catastrophic overfitting"),
    (0.9, 0.1, None, False, None), (0.9, 0.5, 0.7, False, None),  # weaker, but it works still
    (0.95, 0.03, 0.33, False, None),  # many steps break more than one, and that one much
    (0.5, 0.4, 0.45, True, "clean accuracy fell from 90.0% to 50.0%"),
    (0.5, 0.4, 0.45, False, None), (0.55, 0.4, 0.45, True, None)])
def test_failures_are_detected(clean: float, attacked: float, own: float | None, first: bool,
                       wrong: str | None) -> None:
    start = 0.9
    found = remedy(ONE, start, clean, attacked, own, first)
    assert (found is None) == (wrong is None)
    if found is not None and wrong is not None:
        assert wrong in found.reason


def test_a_short_step_is_not_shortened() -> None:
    short = Recipe("nfgsm", rel_step=0.5)
    assert remedy(short, 0.9, 0.9, 0.1, 0.8, False) is None
    assert remedy(Recipe("nfgsm", rel_step=0.6), 0.9, 0.9, 0.1, 0.8, False) is not None


@pytest.mark.parametrize(("best", "now", "wrong"), [
    (0.7, 0.15, True), (0.7, 0.5, False), (0.1, 0.0, False), (0.7, None, False)])
def test_a_loss_of_certified_accuracy_is_detected(best: float, now: float | None,
                                               wrong: bool) -> None:
    found = collapsed(Recipe("ibp"), best, now)
    assert (found is not None) == wrong
    if found is not None:
        assert "from 70.0% to 15.0%" in found.reason and not found.restart
        assert (found.lr_factor, found.changes) == (0.5, "lr times 0.5")


def test_the_inner_step_is_lowered_if_it_is_too_long() -> None:
    large = Recipe("nfgsm", rel_step=4.0, noise=0.0, lr=1e-3)
    found = remedy(large, 0.9, 0.3, 0.2, 0.3, True)
    assert found is not None and (found.recipe.rel_step, found.recipe.noise) == (2.0, 1.0)
    assert found.lr_factor == 1 and found.restart
    plain = remedy(ONE, 0.9, 0.3, 0.2, 0.3, True)
    assert plain is not None and plain.lr_factor == 0.2 and plain.recipe == ONE
    assert remedy(Recipe("nfgsm", lr=1e-3), 0.9, 0.3, 0.2, 0.3, True) is None  # the user's own lr


def test_training_recovers_from_a_forced_collapse(cnn: nn.Module, loader: DataLoader[Any],
                                                         capsys: pytest.CaptureFixture[str],
                                                         ) -> None:
    """Steps of four times eps and no noise: one-step training's known way to fail."""
    model = copy.deepcopy(cnn)
    recipe = Recipe("nfgsm", rel_step=4.0, noise=0.0, lr=2e-3)
    history = fit(model, loader, Threat(eps=0.15), recipe, epochs=4, progress=True)
    assert history.events and "starting again from epoch" in history.events[0]
    assert history.events[0] in capsys.readouterr().err
    naive = copy.deepcopy(cnn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "RETRIES", 0)
        left = fit(naive, loader, Threat(eps=0.15), recipe, epochs=4, progress=False)
    assert (history.kept.validation or 0) > (left.epochs[-1].validation or 0) + 0.1
    assert [e.epoch for e in history.epochs] == list(range(5))


def test_a_single_nan_loss_lowers_the_learning_rate(
        cnn: nn.Module, loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Objective.__call__, iter(range(10**6))

    def loss(self: Objective, *batch: Tensor) -> Tensor:
        return original(self, *batch) * (math.nan if next(calls) == 9 else 1.0)

    monkeypatch.setattr(Objective, "__call__", loss)
    model = copy.deepcopy(cnn)
    history = fit(model, loader, Threat(eps=0.1), Recipe("clean"), epochs=1, progress=False)
    assert len(history.events) == 1 and "the loss is nan at epoch 1, batch 4" in history.events[0]
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert history.kept.clean is not None and history.kept.clean > 0.9


def test_merged_thresholds_are_found() -> None:
    module = QuantActivation.from_thresholds([0.5, 1.5, 2.5], 1.0, dynamic=True)
    model = nn.Sequential(module)
    assert merging(model) == []
    with torch.no_grad():
        module.log_gaps.fill_(-9.0)
    assert merging(model) == ["0"]
    with torch.no_grad():
        module.log_gaps.fill_(math.nan)
    assert merging(model) == ["0"]


def memory_for(images: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Let training fail on more images at once."""
    original = Objective.__call__

    def loss(self: Objective, x: Tensor, *rest: Tensor) -> Tensor:
        if len(x) > images:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return original(self, x, *rest)

    monkeypatch.setattr(Objective, "__call__", loss)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_without_memory_a_batch_is_split_with_the_same_gradient(
        error: type[BaseException], loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    recipe = Recipe("clean", lr=1e-2, precision="float32")
    whole, parts = copy.deepcopy(plain), copy.deepcopy(plain)
    fit(whole, loader, Threat(), recipe, epochs=1, progress=False)
    memory_for(20, monkeypatch, error)
    history = fit(parts, loader, Threat(), recipe, epochs=1, progress=False)
    assert len(history.events) == 2 and "in 4 parts" in history.events[1]
    assert torch.allclose(whole[1].weight, parts[1].weight, atol=1e-5)
    assert not torch.equal(whole[1].weight, plain[1].weight)


def test_no_memory_for_a_single_image_is_an_error(cnn: nn.Module, loader: DataLoader[Any],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(0, monkeypatch, MemoryError)
    with pytest.raises(DataError, match="even with one image at a time"):
        fit(copy.deepcopy(cnn), loader, Threat(), Recipe("clean", lr=1e-3), epochs=1,
            progress=False)


def test_other_errors_are_not_treated_as_a_lack_of_memory(cnn: nn.Module, loader: DataLoader[Any],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("something else")
    monkeypatch.setattr(Objective, "__call__", fail)
    with pytest.raises(RuntimeError, match="something else"):
        fit(copy.deepcopy(cnn), loader, Threat(), Recipe("clean", lr=1e-3), epochs=1,
            progress=False)
