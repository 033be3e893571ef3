"""Checks of a call's arguments that rules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .intervals import Interval
from .registry import NoRule


def dims_of(dims: Any, x: Interval) -> list[int]:
    """Return dimensions as a list of positive numbers; dimension 0 is that of the images."""
    some = list(dims) if isinstance(dims, (tuple, list)) else [] if dims is None else [dims]
    found = [d % len(x.shape) for d in some or range(len(x.shape))]
    if 0 in found:
        raise NoRule("an operation across images")
    return found


def constant(value: Any, x: Interval) -> Tensor:
    """Return a number or tensor in float64, in a shape that broadcasts with one image of x."""
    if isinstance(value, Tensor):
        number = value.detach().double()
        if number.dim() >= len(x.shape):
            if number.dim() > len(x.shape) or number.shape[0] != 1:
                raise NoRule("a constant with a row for each image")
            number = number[0]
        return number.to(x.lower.device)
    if not isinstance(value, (int, float)):
        raise NoRule(f"a {type(value).__name__} among its arguments")
    return torch.tensor(float(value), dtype=torch.float64, device=x.lower.device)


def weights(value: Any) -> Tensor:
    """Return a tensor of weights."""
    if not isinstance(value, Tensor):
        raise NoRule("weights that depend on the image")
    return value.detach()


def float32(dtype: Any) -> None:
    """Check that a dtype is float32, or not given."""
    if dtype not in (None, torch.float32):
        raise NoRule(f"{dtype}: certificates are for float32")
