"""Models and data as files in an empty working directory, and a tiny suite of attacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Digits, write_npz
from torch import nn
from torch.utils.data import TensorDataset

import quantguard as qg
from quantguard.attacks import suites


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``quick`` quicker: every kind of attack, with a few steps each."""
    monkeypatch.setitem(suites._SUITES, "quick", (3, 3, 16))
    monkeypatch.setattr(suites, "MODES", ("sigmoid(8)",))
    monkeypatch.setattr(suites, "SHARPNESSES", suites.SHARPNESSES[:1])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(here: Path, cnn: nn.Module) -> str:
    """The small CNN as ``torch.save`` writes it: model.pt."""
    torch.save(cnn, here / "model.pt")
    return "model.pt"


@pytest.fixture
def converted(here: Path, quantized: nn.Module) -> str:
    qg.save(quantized, here / "converted.qg")
    return "converted.qg"


@pytest.fixture
def data(here: Path, train_digits: TensorDataset, digits: Digits) -> str:
    """400 training and 60 test images as an npz file."""
    x, y = (t.numpy() for t in train_digits.tensors)
    write_npz(here / "small.npz", x[:400], y[:400], digits[0][:60].numpy(), digits[1][:60].numpy())
    return "npz:small.npz"
