"""A model that answers by the mean of its features, and images for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

D = 64

X, Y = torch.full((4, D), 0.5), torch.zeros(4, dtype=torch.long)


class Averaging(nn.Module):
    """A model that compares the mean of its features with 0.44; changes scale them by 3 %."""

    def __init__(self, change: Callable[[Any, Any], Any] = lambda _, y: y) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(D, D, bias=False), nn.Linear(D, 2)
        self.change, self.calls = change, 0
        self.rng = torch.Generator().manual_seed(0)
        self.drop = nn.Dropout(0.1)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(D))
            self.head.weight.copy_(torch.stack([torch.ones(D), torch.zeros(D)]) / D)
            self.head.bias.copy_(torch.tensor([-0.44, 0.0]))

    def train(self, mode: bool = True) -> Averaging:
        super().train(mode)
        self.drop.train()  # as in Monte Carlo dropout
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        changed = self.change(self, y)
        return self.head(y if changed is None else changed)  # type: ignore[no-any-return]
