"""Broadcasts, look-ups and sums over a whole tensor (axis None) or for each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def spread(values: Tensor, x: Tensor, axis: int | None) -> list[Any]:
    """Return the entries of the last dimension of values, each to broadcast against blocks of x."""
    if axis is None:
        return list(values.tolist()) if values.device.type == "cpu" else list(values.unbind(-1))
    shape = [1] * x.dim()
    shape[axis] = -1
    return [v.reshape(shape) for v in values.unbind(-1)]


def sum_to(x: Tensor, axis: int | None) -> Tensor:
    """Return the sum over all but the channel axis, in double: sums of blocks must not drift."""
    if axis is None:
        return x.sum(dtype=torch.float64)
    return x.sum(dim=[d for d in range(x.dim()) if d != axis], dtype=torch.float64)


def histogram(weights: Tensor, code: Tensor, codes: int, axis: int | None) -> Tensor:
    """Return the sums of weights by code: (codes,), or (C, codes) per channel."""
    weights = weights.double()
    if axis is None:
        places = code if code.dtype == torch.uint8 else code.int()
        return torch.bincount(places.reshape(-1), weights.reshape(-1), minlength=codes)
    rows = code.movedim(axis, 0).flatten(1).long()
    rows += codes * torch.arange(rows.shape[0], device=code.device).unsqueeze(1)
    sums = torch.bincount(rows.reshape(-1), weights.movedim(axis, 0).reshape(-1),
                          minlength=codes * rows.shape[0])
    return sums.reshape(-1, codes)


def look_up(table: Tensor, code: Tensor, axis: int | None) -> Tensor:
    """Return ``table[..., code]`` elementwise."""
    if axis is None:
        return table.index_select(0, code.reshape(-1).int()).reshape(code.shape)
    rows = code.movedim(axis, 0)
    return table.gather(1, rows.flatten(1).long()).reshape(rows.shape).movedim(0, axis)
