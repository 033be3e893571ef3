"""Images for the training tests."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(scope="module")
def small(train_digits: TensorDataset) -> TensorDataset:
    """400 images: 80 are held out, five batches are left."""
    return TensorDataset(*(t[:400] for t in train_digits.tensors))


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    return DataLoader(train_digits, batch_size=64, shuffle=True)
