"""Helpers of the tests that fine-tune: settings, loaders, comparison of two runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import quantguard as qg
from quantguard.core.specs import Threat
from quantguard.nn.input_quantizer import is_input
from quantguard.nn.quant_activation import quantizers
from quantguard.training.history import History
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import fit

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)
FAST = Recipe("pgd", steps=1, lr=1e-3)


def loader_of(data: Dataset[Any], batch: int = 64) -> DataLoader[Any]:
    return DataLoader(data, batch_size=batch, shuffle=True)


def trained(model: nn.Module, loader: Any, **options: Any) -> tuple[nn.Module, History]:
    clone = copy.deepcopy(model)
    options = {"epochs": 2, "progress": False, **options}
    return clone, fit(clone, loader, THREAT, options.pop("recipe", FAST), **options)


def assert_same_run(one: tuple[nn.Module, History], two: tuple[nn.Module, History]) -> None:
    states = one[0].state_dict(), two[0].state_dict()
    different = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert not different
    rows = [[(e.epoch, repr(e.loss), e.clean, e.validation, e.lr) for e in h.epochs]
            for h in (one[1], two[1])]
    assert rows[0] == rows[1] and one[1].chosen == two[1].chosen


def inner(model: nn.Module) -> dict[str, qg.QuantActivation]:
    """Return the quantizers of a model without the one on its input."""
    return {name: m for name, m in quantizers(model).items() if not is_input(name)}
