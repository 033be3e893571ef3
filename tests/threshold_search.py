"""Brute-force search for the best step and zero level of a quantizer."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(samples: Tensor, step: float, m: int, zero: float) -> float:
    """Return the mean squared error of a uniform quantizer, in float64."""
    level = (samples.double() / step + zero).round().clamp(0, m) - zero
    return float((level * step - samples.double()).square().mean())


def best(samples: Tensor, m: int, zeros: list[float] | None = None) -> float:
    """Return the smallest error over a fine grid of steps and all whole and half zero levels."""
    values = samples.double().flatten()
    steps = float(values.abs().max()) * torch.logspace(-2.3, 0.1, 250, dtype=torch.float64)
    ratio = (values / steps.unsqueeze(1))
    found = []
    for zero in [z / 2 for z in range(2 * m + 1)] if zeros is None else zeros:
        level = (ratio + zero).round_().clamp_(0, m).sub_(zero)
        found.append((level.sub_(ratio).square_().mean(1) * steps.square()).min())
    return float(torch.stack(found).min())
