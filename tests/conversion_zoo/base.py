"""Base class, inputs and case descriptions of the model zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


class Net(nn.Module):
    """Base class of most zoo models: three layers, no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.features(x) - 0.3)


def rows(batch: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *(shape or (6,)), generator=torch.Generator().manual_seed(seed))


def two(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
    return rows(batch, *shape), rows(batch, *shape, seed=1)


def sequence(batch: int) -> Tensor:
    return rows(batch, 4, 6)


def image(batch: int) -> Tensor:
    return rows(batch, 3, 8, 8)


class Setting(NamedTuple):
    training: bool
    batch: int
    factor: int

    @property
    def seed(self) -> int:
        return 10 * self.batch + self.factor


SETTINGS = tuple(Setting(training, *more) for training in (True, False)
            for more in ((5, 1), (5, -1), (5, 0), (1, 1)))
TYPICAL = (Setting(True, 5, 1), Setting(False, 5, 1))


class Case(NamedTuple):
    """One model of the zoo, its inputs, and the expected result of its conversion.

    Attributes:
        converted: kinds that are quantized, sorted.
        excluded: "kind: reason" of the sites that stay float.
        options: options of convert.
        unreached: quantizers that no input of the checks reaches.
        warns: whether inputs reach an activation that the example did not reach.
        pickles: whether torch.save can save the float model.
        checks: the checks to run; empty: all.
        fused: whether torch has a fused path without gradients, with other last bits.
        settings: modes and inputs to run it on.
    """

    make: Callable[[], nn.Module]
    converted: str
    excluded: tuple[str, ...] = ()
    inputs: Callable[[int], Any] = rows
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    unreached: tuple[str, ...] = ()
    warns: bool = False
    pickles: bool = True
    checks: tuple[str, ...] = ()
    fused: bool = False
    settings: tuple[Setting, ...] = SETTINGS


OUTPUT = "model output"
PERHAPS, UNSEEN = "gate (assumed): returned to the caller", "gate (assumed): no graph shows its use"
UNREACHED = "not reached by the example"
AGAIN = "inside a checkpoint, run again later"
SOFTMAX, CELL = "attention: attention softmax", "rnn: fused cell"
