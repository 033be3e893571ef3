"""Loaders of a few digits."""

from __future__ import annotations

from typing import Any

import pytest
from fine_tuning import Digits
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    """400 images: 80 are held out, five batches are left."""
    return DataLoader(TensorDataset(*(t[:400] for t in train_digits.tensors)), batch_size=64,
                      shuffle=True)


@pytest.fixture(scope="module")
def test_loader(digits: Digits) -> DataLoader[Any]:
    return DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=60)
