"""Fixtures of the tests of core: batches of digits, and a model hardened on normalised ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from normalised_digits import MEAN, OWN, STD, Digits
from public_calls import Batches
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import quantguard as qg
from quantguard.attacks import suites
from quantguard.cli.demo import small_cnn, train_clean
from quantguard.data.loader import load_data


@pytest.fixture
def batches(train_digits: TensorDataset) -> Batches:
    """Two batches of 24 training images."""
    images, labels = train_digits.tensors
    return [(images[i:i + 24].clone(), labels[i:i + 24].clone()) for i in (0, 24)]


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite ``quick`` with few steps, because its results do not matter."""
    monkeypatch.setitem(suites._SUITES, "quick", (2, 2, 8))
    monkeypatch.setattr(suites, "MODES", ("sigmoid(8)",))
    monkeypatch.setattr(suites, "SHARPNESSES", suites.SHARPNESSES[:1])


@pytest.fixture(scope="session")
def normalised() -> nn.Module:
    """The demo's CNN, trained on digits of mean 0.3 and std 0.4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn()
        train_clean(model, load_data("digits", "train", batch_size=64, mean=MEAN, std=STD), 3,
                    progress=False)
    return model


@pytest.fixture(scope="session")
def hardened(normalised: nn.Module) -> nn.Module:
    """``normalised`` after an epoch of adversarial training on 300 images."""
    train: Any = load_data("digits", "train", batch_size=64, mean=MEAN, std=STD)
    few = DataLoader(Subset(train.dataset, range(300)), batch_size=64)
    return qg.harden(normalised, few, OWN, epochs=1, progress=False,
                     recipe=qg.Recipe("pgd", steps=1, lr=1e-3))


@pytest.fixture(scope="session")
def loader(digits: Digits) -> list[Digits]:
    """The normalised test images, as one batch."""
    return [((digits[0] - MEAN) / STD, digits[1])]


@pytest.fixture
def here(tmp_path: Path, normalised: nn.Module, hardened: nn.Module,
         monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with both models in files."""
    monkeypatch.chdir(tmp_path)
    torch.save(normalised, "net.pt")
    qg.save(hardened, "net.qg")
    return tmp_path
