"""Classes that the files of tests/fixtures/qg name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Spelled(nn.Module):
    """A spelled-out activation, a method and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * (x > 0)
        return self.head(F.silu(x).flatten(1).tanh())


class Branching(nn.Module):
    """A branch on data: no graph holds both of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(x) if float(x.mean()) > -1e9 else F.elu(x)
        return self.head(F.gelu(x).flatten(1))
