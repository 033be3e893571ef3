"""The adversarials of each model of a comparison are tried on the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, Entry
from quantguard.core.specs import Threat


class Corner(nn.Module):
    """Class 1 where one pixel is bright; ``gradient_free`` hides the gradient."""

    def __init__(self, gradient_free: bool, key: bool = False) -> None:
        super().__init__()
        self.gradient_free, self.key = gradient_free, key

    def forward(self, x: Tensor | None = None, *, pixels: Tensor | None = None) -> Tensor:
        x = pixels if self.key else x
        assert x is not None
        z = x[:, 0, 0, 0] - 0.5
        if self.gradient_free:
            z = z.detach() + 0 * x.flatten(1).sum(1)
        return torch.stack([-z, z], 1)


def loader(key: bool = False) -> Any:
    x, y = torch.full((30, 1, 4, 4), 0.45), torch.zeros(30).long()
    x[20:] = 0.2
    if key:
        return [{"pixels": x, "labels": y}]
    return DataLoader(TensorDataset(x, y), batch_size=30)


def compared(models: dict[str, nn.Module], key: bool = False) -> qg.Comparison:
    suite = [Entry("PGD", PGD("ce", 3, noise=0.0), "pgd", True)]
    return qg.compare(models, loader(key), Threat(eps=0.1), suite=suite, progress=False)


@pytest.mark.parametrize("key", [False, True])
def test_a_model_that_hides_its_gradient_is_broken_by_transfer(key: bool) -> None:
    table = compared({"open": Corner(False, key), "hidden": Corner(True, key)}, key)
    first, second = table.rows.values()
    assert int(first.survived.sum()) == 10 and [a.label for a in first.attacks] == ["PGD"]
    assert np.array_equal(first.survived, second.survived)
    assert [(a.label, int(a.broken.sum())) for a in second.attacks] == [
        ("PGD", 0), ("transfer from open", 20)]
    raised = {f.name: f.kind for f in second.flags if f.raised}
    assert raised["transfer beats white-box"] == "unresolved"
    assert raised["default attacks overstate"] == "masked"
    assert len({f.name for f in second.flags}) == len(second.flags)
    found = torch.from_numpy(second.adversarials)
    assert bool((found[:20, 0, 0, 0] > 0.5).all()) and float(
        (found - torch.full((30, 1, 4, 4), 0.45))[:20].abs().max()) <= 0.1 + 1e-6


def test_nothing_is_transferred_if_nothing_was_broken() -> None:
    table = compared({"a": Corner(True), "b": Corner(True)})
    assert all([a.label for a in e.attacks] == ["PGD"] for e in table.rows.values())


def test_a_transfer_survives_json() -> None:
    table = compared({"open": Corner(False), "hidden": Corner(True)})
    again = qg.Comparison.from_dict(table.to_dict())
    assert again.rows["hidden"].attacks[1].label == "transfer from open"
    assert np.array_equal(again.rows["hidden"].survived, table.rows["hidden"].survived)
