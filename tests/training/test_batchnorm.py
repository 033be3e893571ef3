"""BatchNorm statistics before and during training."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hardening_stages import FAST, staged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantguard.training.batchnorm import reestimate
from quantguard.training.recipes import Recipe


def test_statistics_are_estimated_from_the_new_activations(cnn: nn.Module,
                                                     loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    model[0].weight.data *= 3.0
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    reestimate(model, loader)
    with torch.no_grad():
        x = torch.cat([images for images, _ in loader])
        inner = model[0](x)
    assert torch.allclose(model[1].running_mean, inner.mean((0, 2, 3)), atol=1e-2)
    assert torch.allclose(model[1].running_var, inner.var((0, 2, 3)), rtol=0.05)
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not model.training and not model[1].training


@pytest.mark.parametrize("recipe", ["pgd", "ibp"])
def test_a_last_batch_of_one_image_is_left_out_of_the_statistics(recipe: str,
                                                     train_digits: TensorDataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(),
                          nn.Linear(32, 10)).eval()
    x, y = (t[:65] for t in train_digits.tensors)
    batches = DataLoader(TensorDataset(x, y), batch_size=64)
    staged(model, batches, dynamic=False, recipe=recipe, epochs=1, val=[(x, y)])
    reestimate(model, batches)
    assert torch.allclose(model[2].running_mean, model[1](x[:64].flatten(1)).mean(0), atol=1e-5)


def test_training_starts_from_statistics_of_the_converted_model(cnn: nn.Module,
                                                            loader: DataLoader[Any]) -> None:
    """An input quantizer changes the images, so the old statistics do not fit."""
    def start(bits: int, train: str) -> float | None:
        recipe = dataclasses.replace(FAST, lr=None if train == "thresholds" else FAST.lr)
        return staged(cnn, loader, bits=bits, dynamic=None if bits == 32 else True, epochs=1,
                      recipe=recipe, train=train).stages[0].history.epochs[0].clean
    frozen, renewed, control = start(2, "thresholds"), start(2, "all"), start(32, "all")
    assert frozen and renewed and control
    print(frozen, renewed, control)
    assert renewed > frozen + 0.1 and control > 0.9


def test_the_float_parent_keeps_its_statistics(cnn: nn.Module, loader: DataLoader[Any],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    from quantguard.training import trainer
    seen: list[float | None] = []

    class Watched(trainer.Trainer):
        def _begin(self, saved: Any) -> None:
            super()._begin(saved)
            seen.append(self.parent_clean)
            teacher = self.train_step.objective.teacher
            assert teacher is not None
            x, y = self.batches(next(iter(self.source.val)), 0)
            seen.append(float((teacher(x).argmax(1) == y).float().mean()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Trainer", Watched)
        staged(cnn, loader, recipe=Recipe("pgd", steps=1, lr=1e-3, distill=0.5), epochs=1)
    assert all(value is not None and value > 0.93 for value in seen) and len(seen) == 2


def test_a_frozen_batchnorm_keeps_its_statistics_in_training(cnn: nn.Module,
                                                             loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    first, *others = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first.requires_grad_(False)
    made = staged(model, loader, bits=32, dynamic=None, recipe=Recipe("clean", lr=1e-3), epochs=1)
    after, *rest = [m for m in made.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(after.running_mean, first.running_mean)
    assert not any(torch.equal(a.running_mean, b.running_mean)
                   for a, b in zip(rest, others, strict=True))


def test_statistics_of_a_frozen_batchnorm_are_not_estimated_again(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    first, *others = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first.requires_grad_(False)
    # with an input quantizer
    made = staged(model, loader, bits=32, dynamic=None, recipe=FAST, epochs=1)
    after, *rest = [m for m in made.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(after.running_mean, first.running_mean)
    assert torch.equal(after.running_var, first.running_var)
    assert not any(torch.equal(a.running_mean, b.running_mean)
                   for a, b in zip(rest, others, strict=True))
