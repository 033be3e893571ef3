"""The source of a user's model, and checks of the weights that are loaded into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantguard.core.model_loading.load_model import load_model

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)
    def forward(self, x):
        return self.head(self.body(x.flatten(1)))
"""


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other weights of the same shapes."""
    return {k: v + 1 for k, v in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def loaded(content: object, file: str = "c.pt", **options: Any) -> nn.Module:
    torch.save(content, "c.pt")
    return load_model(file, arch="qg_net:Net", **options)
