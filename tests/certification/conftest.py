"""A 2-bit model of digits that some test files share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantguard as qg
from quantguard.cli.demo import train_clean


@pytest.fixture(scope="module")
def digits_model(train_digits: Any, digits: Any) -> tuple[nn.Module, list[Any]]:
    """Return a 2-bit perceptron, which certifies some digits, and 100 test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        loader = torch.utils.data.DataLoader(train_digits, batch_size=64)
        train_clean(model, loader, 15, progress=False)
        model = qg.convert(model, 2, data=loader)
    x, y = digits
    return model, [(x[:60], y[:60]), (x[60:100], y[60:100])]
