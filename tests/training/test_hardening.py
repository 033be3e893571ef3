"""Hardening models of other types, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fine_tuning import inner
from hardening_stages import staged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantguard.core.errors import SpecError
from quantguard.training.recipes import Recipe


def test_a_float64_model_is_hardened_with_images_as_loaders_give_them(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    made = staged(copy.deepcopy(cnn).double(), loader, epochs=1, recipe=Recipe("pgd", steps=1))
    assert {p.dtype for n, p in made.model.named_parameters() if "weight" in n} == {torch.float64}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_stays_half_precision(kind: torch.dtype, cnn: nn.Module,
                                                     loader: DataLoader[Any]) -> None:
    made = staged(copy.deepcopy(cnn).to(kind), loader, epochs=1)
    assert {p.dtype for n, p in made.model.named_parameters() if "weight" in n} == {kind}
    x, y = next(iter(loader))
    assert float((made.model(x.to(kind)).argmax(1) == y).float().mean()) > 0.8


def test_ibp_refuses_frozen_weights(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(SpecError, match="reinitialises weights, and 1 are frozen"):
        staged(model, loader, recipe="ibp")


@pytest.mark.parametrize("recipe", ["ibp", "clean"])
def test_the_callers_random_numbers_do_not_change(recipe: str, cnn: nn.Module,
                                           loader: DataLoader[Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    staged(cnn, loader, recipe=recipe, epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_calibration_sees_all_classes_of_a_sorted_data_set(cnn: nn.Module,
                                                           train_digits: TensorDataset) -> None:
    x, y = train_digits.tensors
    order = y.argsort()
    data = TensorDataset(x[order], y[order])
    one = staged(cnn, DataLoader(data, batch_size=16), epochs=1, recipe=Recipe("nfgsm", lr=1e-9),
                 dynamic=False)
    other = staged(cnn, DataLoader(data, batch_size=16, shuffle=True), epochs=1,
                   recipe=Recipe("nfgsm", lr=1e-9), dynamic=False)
    mine, shuffled = (inner(made.model) for made in (one, other))
    assert all(torch.equal(mine[n].thresholds, shuffled[n].thresholds) for n in mine)
