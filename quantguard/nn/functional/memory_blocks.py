"""Memory order and cache-sized blocks of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of a block: few enough that results stay in the cache between operations, and enough to
# keep several threads busy in each operation.
BLOCK = 1 << 19


def dense(x: Tensor) -> Tensor:
    """Return x with gapless strides, in its own memory order where it has one."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x if x.permute(order).is_contiguous() else x.contiguous()


def without_denormals(x: Tensor) -> Tensor:
    """Return x with zeros in place of denormal numbers, on a CPU.

    Slopes far from a threshold are denormal, and a few denormal numbers make a convolution much
    slower.
    """
    if x.device.type != "cpu" or x.dtype == torch.float16:  # many float16 gradients are denormal
        return x
    return torch.hardshrink(x, torch.finfo(x.dtype).tiny)


def remainder(done: int, *tensors: Tensor) -> list[Any]:
    """Return tensors of one gapless layout without their first ``done`` elements in memory."""
    if not done:
        return list(tensors)
    return [v.reshape(-1)[done:] for v in in_memory_order(*tensors)]


def in_memory_order(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one gapless layout with their dimensions in memory order."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    return [x.permute(order) for x in tensors]


def cache_blocks(*tensors: Tensor, axis: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of tensors of one layout that fit the cache; flat where axis is None."""
    first = tensors[0]
    if axis is None:
        flat = [x.reshape(-1) for x in in_memory_order(*tensors)]
        size = BLOCK if first.device.type == "cpu" else max(first.numel(), 1)
        for start in range(0, first.numel(), size):
            yield tuple(x[start : start + size] for x in flat)
    elif first.device.type != "cpu" or axis == 0 or first.numel() <= BLOCK:
        yield tensors
    else:
        rows = max(1, BLOCK * first.shape[0] // max(first.numel(), 1))
        for start in range(0, first.shape[0], rows):
            yield tuple(x[start : start + rows] for x in tensors)
