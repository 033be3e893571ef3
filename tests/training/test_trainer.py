"""The fine-tuning loop: recipes, the best epoch, learning rates, impossible settings."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from fine_tuning import FAST, THREAT, loader_of, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from quantguard.attacks import PixelModel
from quantguard.core.errors import DataError, SpecError
from quantguard.training import trainer
from quantguard.training.objectives import Objective
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import fit
from quantguard.training.validation import Validation


@pytest.mark.parametrize("recipe", [FAST, Recipe("pgd")], ids=["lr", "no lr"])
def test_nothing_to_train_is_an_error(recipe: Recipe, cnn: nn.Module,
                                      small: TensorDataset) -> None:
    model = copy.deepcopy(cnn).requires_grad_(False)
    with pytest.raises(SpecError, match="every parameter is frozen"):
        trained(model, loader_of(small), recipe=recipe)


@pytest.mark.parametrize("recipe", [FAST, Recipe("pgd"), Recipe("nfgsm"), Recipe("clean"),
                                    Recipe("trades", awp=0.01),
                                    Recipe("pgd", mix=0.5, distill=0.5)],
                         ids=lambda r: f"{r.name} lr={r.lr}")
def test_every_recipe_trains_logs_and_leaves_modes_and_random_numbers(
        recipe: Recipe, quantized: nn.Module, small: TensorDataset) -> None:
    model = copy.deepcopy(quantized)
    model[1].train()
    model[0].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    history = fit(model, loader_of(small), THREAT, recipe, epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[0].weight, quantized[0].weight)
    assert [e.epoch for e in history.epochs] == [0, 1] and history.chosen in (0, 1)
    record = history.to_dict()
    assert json.loads(json.dumps(record)).keys() == record.keys() == {
        "epochs", "chosen", "lr", "levels", "events", "precision"}


@pytest.mark.parametrize(("scores", "images", "chosen"), [
    ([0.3, 0.5, 0.4, 0.5, 0.1], 512, 3),  # of equals the later one
    ([0.3, 0.5, 0.48, 0.49, 0.1], 512, 3),  # within a standard error, 2.2 %: the later one
    ([0.3, 0.5, 0.48, 0.47, 0.46], 512, 2),  # of the best, not of the one before
    ([0.3, 0.5, 0.48, 0.47, 0.46], 100, 4),  # fewer images tell less apart
    ([0.3, 0.5, 0.48, 0.49, 0.4], 100_000, 1)])
def test_the_latest_epoch_within_a_standard_error_of_the_best_is_returned(
        scores: list[float], images: int, chosen: int, quantized: nn.Module, small: TensorDataset,
        monkeypatch: pytest.MonkeyPatch) -> None:
    left, states = iter(scores), []

    def validate(model: PixelModel, *_: Any) -> Validation:
        states.append(copy.deepcopy(model.model.state_dict()))
        return Validation(0.9, next(left), images)

    monkeypatch.setattr(trainer, "validate", validate)
    recipe = Recipe("pgd", steps=2, lr=1e-3)
    model, history = trained(quantized, loader_of(small), epochs=4, recipe=recipe)
    assert history.chosen == chosen
    assert all(torch.equal(v, states[chosen][k]) for k, v in model.state_dict().items())


def test_a_learning_rate_that_wrecks_the_model_is_lowered_with_a_message(
        cnn: nn.Module, small: TensorDataset, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trainer, "auto_lr", lambda *_: 0.5)
    _, history = trained(cnn, loader_of(small), epochs=1, recipe=Recipe("clean"), progress=True)
    assert history.lr in [pytest.approx(0.5 / 5**n) for n in (1, 2, 3)]
    log = capsys.readouterr().err
    assert "starting again from epoch 0 with lr times 0.2" in log
    assert history.events and all(event in log for event in history.events)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_any_number_of_steps_is_trained(batches: int, epochs: int) -> None:
    model = nn.Linear(3, 2).eval()
    before = model.weight.detach().clone()
    loader = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))] * batches
    history = fit(model, loader, THREAT, FAST, epochs=epochs, val=loader[:1], progress=False)
    assert len(history.epochs) == epochs + 1
    assert not torch.equal(model.weight, before) or history.chosen == 0
    assert model.weight.isfinite().all()


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs=0"), ({"epochs": 1.5}, "epochs=1.5"),
    ({"train": "steps"}, "Use all or thresholds")])
def test_impossible_settings(options: dict[str, Any], message: str, cnn: nn.Module,
                             small: TensorDataset) -> None:
    with pytest.raises(SpecError, match=message):
        trained(cnn, loader_of(small), **options)


@pytest.mark.parametrize(("lr", "message"), [
    (None, "NaN or infinite on the first batches"), (1e-3, "the loss is nan at epoch 1, batch 2")])
def test_a_loss_that_is_not_finite_is_an_error_and_not_a_result(
        lr: float | None, message: str, cnn: nn.Module, small: TensorDataset,
        monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Objective.__call__, itertools.count()

    def loss(self: Objective, *batch: Tensor) -> Tensor:
        return original(self, *batch) * (torch.nan if next(count) == 3 else 1.0)

    monkeypatch.setattr(Objective, "__call__", loss)
    with pytest.raises(DataError, match=message):
        trained(cnn, loader_of(small), recipe=Recipe("clean", lr=lr))
