"""Short suites, models and loaders for tests of evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, Entry, Noise
from quantguard.attacks.base import fb
from quantguard.core.specs import Threat
from quantguard.evaluation.results import Evaluation

Digits = tuple[Tensor, Tensor]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]
EPS = 0.1
ONES = torch.ones(4, dtype=torch.long)
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def cheap(norm: str = "linf") -> list[Any]:
    """Return a suite with one attack of each group, which takes seconds."""
    return [Entry("noise", Noise(norm, 3), "noise", True),
            Entry("FGSM", fb.attacks.LinfFastGradientAttack() if norm == "linf" else
                  fb.attacks.L2FastGradientAttack(), "fgsm", True),
            Entry("PGD", PGD("ce", 5, norm=norm), "pgd", True),
            Entry("C&W", fb.attacks.L2CarliniWagnerAttack(2, 5, abort_early=False), "cw", True),
            Entry("softened", PGD("margin", 10, sharpness=(2, 16), norm=norm), "softened")]


def measured(model: nn.Module, loader: Any, threat: Threat | None = None,
             **options: Any) -> Evaluation:
    options = {"suite": cheap(), "progress": False, **options}
    return qg.evaluate(model, loader, threat or Threat(eps=EPS), **options)


def batches(digits: Digits, n: int, size: int = 64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(digits[0][:n], digits[1][:n]), batch_size=size)


class Stub(fb.attacks.base.FixedEpsilonAttack):
    """Return images plus ``size``, whatever the threat."""

    def __init__(self, size: float) -> None:
        self.size = size

    distance = fb.distances.linf

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **_: Any) -> Any:
        return inputs + self.size


class Bright(nn.Module):
    """Class 1 where the mean is above 0.5; its gradient in every pixel is the same."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1).mean(1) - 0.5
        return torch.stack([-s, s], 1)


def grey(*levels: float) -> list[Digits]:
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return [(x, (torch.tensor(levels) > 0.5).long())]


def raised(result: Evaluation) -> dict[str, str]:
    return {flag.name: flag.kind for flag in result.flags if flag.raised}


class Slow(PGD):
    """Sleep in each batch, and break its first ``breaks`` images."""

    def __init__(self, seconds: float = 0.0, breaks: int = 0, steps: int = 1) -> None:
        super().__init__("ce", steps)
        self.wait, self.breaks = seconds, breaks

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        time.sleep(self.wait)
        found = inputs.clone()
        found[: self.breaks] = 0.55
        return found


def dim(n: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.full((n, 1, 4, 4), 0.45), torch.zeros(n).long()),
                      batch_size=50)


def labels(result: Evaluation) -> list[str]:
    return [attack.label for attack in result.attacks]


def entry(name: str, group: str = "pgd", **options: Any) -> Entry:
    return Entry(name, Slow(**options), group)
