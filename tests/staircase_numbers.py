"""Thresholds and inputs for tests of the staircase function, and a naive staircase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantguard.nn.functional.staircase import MODES, Surrogate

SURROGATES = [Surrogate(mode) for mode in MODES]


class Stairs(NamedTuple):
    """Numbers of one staircase: t (m,) or (C, m), step and width () or (C,), zero ()."""

    t: Tensor
    step: Tensor
    width: Tensor
    zero: Tensor


def stairs(bits: int, channels: int | None = None, *, equal: bool = False, zero: float = 0.0,
           seed: int = 0) -> Stairs:
    generator = torch.Generator().manual_seed(seed)
    rows = () if channels is None else (channels,)
    m = 2**bits - 1
    gaps = 0.2 + torch.rand(*rows, m, generator=generator)
    if equal:
        gaps = gaps[..., :1].expand(*rows, m)
    t = gaps.cumsum(-1) - zero * gaps.mean(-1, keepdim=True)
    step = 0.3 + torch.rand(rows, generator=generator)
    return Stairs(t, step, 0.5 + step, torch.tensor(zero))


def inputs(shape: tuple[int, ...], s: Stairs, axis: int | None, seed: int = 1) -> Tensor:
    """Return values over the whole range, about half of them thresholds."""
    generator = torch.Generator().manual_seed(seed)
    low, high = float(s.t.min()) - 1, float(s.t.max()) + 1
    x = low + (high - low) * torch.rand(shape, generator=generator)
    m = s.t.shape[-1]
    pick = torch.randint(m, shape, generator=generator)
    if axis is None:
        ties = s.t[pick]
    else:
        rows = pick.movedim(axis, 0)
        ties = s.t.gather(1, rows.flatten(1)).reshape(rows.shape).movedim(0, axis)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, ties, x)


def naive(x: Tensor, s: Stairs, axis: int | None = None) -> Tensor:
    """Return q(x) in float64, one element at a time."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for index in itertools.product(*map(range, x.shape)):
        row = () if axis is None else index[axis]
        value = float(x[index])
        count = sum(value > bound for bound in s.t[row].tolist())
        out[index] = math.nan if value != value else float(s.step[row]) * (count - float(s.zero))
    return out


def away(x: Tensor, edges: Tensor) -> Tensor:
    """Return the elements of x that are not close to an edge, for finite differences."""
    distance = (x.unsqueeze(-1) - edges).abs().amin(-1)
    return x[distance > 1e-3]


def gradients(function: Callable[..., Tensor], x: Tensor, s: Stairs, upstream: Tensor,
              ) -> tuple[Tensor, Tensor, Tensor]:
    x, t, step = (v.clone().requires_grad_() for v in (x, s.t, s.step))
    function(x, t, step).backward(upstream)
    assert x.grad is not None and t.grad is not None and step.grad is not None
    return x.grad, t.grad, step.grad


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-5, atol=2e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "one channel": lambda x: x[:, 1:2],
    "flipped view": lambda x: x.transpose(0, 2),
}
