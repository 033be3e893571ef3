"""Penalty on inputs of a quantizer that lie close to its thresholds.

Its value and its gradient are computed in one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import compiled_kernels as compiled
from .functional import eager_kernels as eager
from .functional.memory_blocks import dense, remainder, without_denormals
from .functional.staircase import needs_plain_operations, without_function_modes

# With more thresholds than this only the nearest one counts.
_MOST = 15
# Steepness of a bell, over the step.
_SHARPNESS = 8.0


def threshold_margin(z: Tensor, t: Tensor, step: Tensor, axis: int | None = None) -> Tensor:
    """Return ``mean 4 p (1 - p)``, p = sigma(8 (z - t_i) / step), over elements and thresholds.

    It is 1 at a threshold and falls to 0 away from it. Above 4 bits all but the nearest threshold
    count as 0. Thresholds and step get no gradient.

    Args:
        z: any shape, floating point.
        t: (m,) thresholds, ascending; (C, m) per channel.
        step: () or (C,), positive.
        axis: the channel dimension of z where thresholds are per channel.
    """
    t, step = t.detach(), step.detach()
    m = t.shape[-1]
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    if axis is None and m <= _MOST and z.numel() and not needs_plain_operations():
        with without_function_modes(z):
            total: Tensor = _Margin.apply(z, t, (_SHARPNESS / step).expand(m))
            return total * (4 / (m * z.numel()))
    if axis is not None:
        z, step = z.movedim(axis, -1).flatten(0, -2), step.unsqueeze(0)
    if m <= _MOST or axis is not None:
        centers: list[Tensor] = list(t.unbind(-1))
    else:  # p (1 - p) falls to a thousandth from one threshold to the next
        z = z.contiguous()  # bucketize warns about other strides
        centers = [t[torch.bucketize(z.detach(), (t[1:] + t[:-1]) / 2)]]
    mean = torch.zeros((), device=z.device)
    for center in centers:
        p = torch.sigmoid((z - center) * (_SHARPNESS / step))
        mean = mean + (p * (1 - p)).mean()
    return 4 / m * mean


class _Margin(torch.autograd.Function):
    """Sum of p (1 - p) over elements and thresholds; its slope is saved instead of each p."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, sharpness: Tensor) -> Tensor:
        z = dense(z)
        slope = torch.empty_like(z)
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        done = compiled.margin(z, t, sharpness, slope, total)
        rest, slopes = remainder(done, z, slope)
        eager.margin(rest, t, sharpness, slopes, total)
        ctx.save_for_backward(slope)
        return total.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return without_denormals(slope * grads[0]), None, None
