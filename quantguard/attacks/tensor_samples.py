"""Fixed samples of a tensor's values, and the channel of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_indices(shape: torch.Size, count: int) -> Tensor:
    """Return the flat indices sampled from tensors of a shape, (count,) or fewer, ascending."""
    numel = math.prod(shape)
    if numel <= count:
        return torch.arange(numel)
    generator = torch.Generator().manual_seed(numel)
    return torch.randint(numel, (count,), generator=generator).sort().values


def channels_at(shape: torch.Size, indices: Tensor, axis: int | None) -> Tensor:
    """Return the channel of each flat index; 0 without an axis."""
    if axis is None:
        return torch.zeros_like(indices)
    stride = math.prod(shape[axis % len(shape) + 1:])
    return indices // stride % shape[axis]


def channel_axes(shape: torch.Size) -> list[int | None]:
    """Return the axes that may hold channels, after None for no channels."""
    return [None, 1, -1] if len(shape) == 3 else [None, 1] if len(shape) > 1 else [None]
