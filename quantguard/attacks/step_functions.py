"""Step functions fitted to samples, and their softened forms.

All that is known of a function is pairs of numbers ``(z, y)``. Sorted by z, a step function has few
runs of one y each; a threshold lies between two runs. All functions here are pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.functional.staircase import MOST_SOFTENED, soft_jumps
from ..nn.functional.surrogates import typical, windows

# Levels closer than this share of their range count as one, since ``z + (q(z) - z)`` rounds.
SAME_LEVEL = 1e-5
# Levels of a low-bit quantizer, at most: 8 bits.
MOST_LEVELS = 256
# Samples of a run, on average, that are needed to tell that y is constant on it.
_LEAST_SUPPORT = 3
# A run whose neighbours are closer than this share of z's range is a single point.
_POINT = 1e-4


class Steps(NamedTuple):
    """A step function ``y = base + sum_i jumps_i 1[z > thresholds_i]``.

    Attributes:
        thresholds: (m,) ascending; (C, m) per channel, padded where a channel has fewer.
        jumps: of the same shape, of either sign; 0 for padding.
        base: () or (C,), the value below all thresholds.
        axis: the channel dimension; None: one function for all elements.
    """

    thresholds: Tensor
    jumps: Tensor
    base: Tensor
    axis: int | None


class Samples(NamedTuple):
    """Samples of a function, each in a channel.

    Attributes:
        z, y: (S,) float64, arguments and values.
        channel: (S,) int64, from 0.
    """

    z: Tensor
    y: Tensor
    channel: Tensor


class _Runs(NamedTuple):
    """Runs of one y each, channel by channel in ascending z.

    Attributes:
        low, high: first and last z of each run.
        y: value on each run.
        channel: channel of each run.
        levels: number of different values, added up over channels.
    """

    low: Tensor
    high: Tensor
    y: Tensor
    channel: Tensor
    levels: int


def _runs(samples: Samples) -> _Runs:
    """Return the runs of samples sorted by channel and z."""
    order = samples.z.argsort(stable=True)
    order = order[samples.channel[order].argsort(stable=True)]
    z, y, channel = samples.z[order], samples.y[order], samples.channel[order]
    groups = int(channel[-1]) + 1
    lowest = y.new_full((groups,), torch.inf).scatter_reduce(0, channel, y, "amin")
    highest = y.new_full((groups,), -torch.inf).scatter_reduce(0, channel, y, "amax")
    # Relative to a channel's own range, as channels may have very different scales.
    near = (SAME_LEVEL * (highest - lowest).clamp_min(1e-12))[channel]
    new = torch.ones_like(z, dtype=torch.bool)
    new[1:] = (channel[1:] != channel[:-1]) | ((y[1:] - y[:-1]).abs() > near[1:])
    first = new.nonzero().squeeze(1)
    last = torch.cat([first[1:] - 1, first.new_tensor([len(z) - 1])])
    sorted_y = y.argsort(stable=True)
    sorted_y = sorted_y[channel[sorted_y].argsort(stable=True)]
    other = (channel[sorted_y][1:] != channel[sorted_y][:-1]) | (
        (y[sorted_y][1:] - y[sorted_y][:-1]).abs() > near[sorted_y][1:])
    return _Runs(z[first], z[last], y[first], channel[first], 1 + int(other.sum()))


def _without_points(runs: _Runs) -> _Runs:
    """Return the runs without single points, such as that of a sign at 0."""
    span = float(runs.high.max() - runs.low.min())
    inner = torch.zeros_like(runs.channel, dtype=torch.bool)
    inner[1:-1] = (runs.channel[:-2] == runs.channel[1:-1]) & (
        runs.channel[2:] == runs.channel[1:-1])
    gap = torch.full_like(runs.low, torch.inf)
    gap[1:-1] = runs.low[2:] - runs.high[:-2]
    wide = ~(inner & (gap <= _POINT * span))
    return _Runs(runs.low[wide], runs.high[wide], runs.y[wide], runs.channel[wide], runs.levels)


def is_step_function(samples: Samples) -> bool:
    """Return whether y may be a step function of z in each channel, and is not constant.

    A function that is not monotonic may have up to two runs for each level.
    """
    runs = _runs(samples)
    groups = len(torch.unique(samples.channel))
    return len(runs.y) > groups and len(runs.y) <= 2 * runs.levels \
        and len(runs.y) * _LEAST_SUPPORT <= len(samples.y)


def has_few_levels(y: Tensor, channel: Tensor) -> bool:
    """Return whether y (S,) takes few values in each channel, many times each.

    At least half of the samples other than each channel's most common value have to be repeated:
    the most common value alone proves nothing, as a ReLU's output is often 0.
    """
    order = y.argsort(stable=True)
    order = order[channel[order].argsort(stable=True)]
    values, groups = y[order], channel[order]
    span = (values.max() - values.min()).clamp_min(1e-12)
    new = torch.ones_like(groups, dtype=torch.bool)
    new[1:] = (groups[1:] != groups[:-1]) | (values[1:] - values[:-1] > SAME_LEVEL * span)
    level = new.cumsum(0) - 1
    counts = torch.bincount(level)
    per_channel = torch.bincount(groups[new], minlength=int(groups[-1]) + 1)
    if int(per_channel.max()) > MOST_LEVELS or len(counts) == len(per_channel.nonzero()):
        return False
    owner = groups[new]
    most = counts.new_zeros(len(per_channel)).scatter_reduce(0, owner, counts, "amax")
    common = counts == most[owner]
    rest = counts[~common]
    if not len(rest):  # two values, equally often
        return len(counts) * _LEAST_SUPPORT <= len(y)
    return bool(2 * rest[rest > 1].sum() >= rest.sum())


def brackets(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples around each jump: z below it, z above it, and channel, (B,) each."""
    runs = _runs(samples)
    same = runs.channel[1:] == runs.channel[:-1]
    return runs.high[:-1][same], runs.low[1:][same], runs.channel[1:][same]


def fit(samples: Samples, channels: int, axis: int | None) -> Steps | None:
    """Return the step function that fits the samples, or None.

    Args:
        samples: of the function; each threshold is placed midway between two of them.
        channels: number of channels; 1 without an axis.
        axis: of the channels.
    """
    if not len(samples.y) or not is_step_function(samples):
        return None
    runs = _without_points(_runs(samples))
    same = runs.channel[1:] == runs.channel[:-1]
    channel = runs.channel[1:][same]
    counts = torch.bincount(channel, minlength=channels)
    m = int(counts.max())
    if m >= MOST_LEVELS:
        return None
    middles = ((runs.high[:-1] + runs.low[1:]) / 2)[same]
    jumps = (runs.y[1:] - runs.y[:-1])[same]
    starts = counts.cumsum(0) - counts
    at = torch.arange(len(channel)) - starts[channel]
    t = middles.new_full((channels, m), torch.nan)
    d = middles.new_zeros((channels, m))
    t[channel, at], d[channel, at] = middles, jumps
    base = runs.y.new_zeros(channels)
    first = torch.ones_like(runs.channel, dtype=torch.bool)
    first[1:] = ~same
    base[runs.channel[first]] = runs.y[first]
    t = _padded(t, counts)
    if axis is None:
        t, d, base = t[0], d[0], base[0]
    return Steps(t.float(), d.float(), base.float(), axis)


def _padded(t: Tensor, counts: Tensor) -> Tensor:
    """Return thresholds (C, m) with missing ones continued at the channel's mean distance."""
    known = t.nan_to_num(0.0)
    rows = torch.arange(len(t))
    last = known[rows, (counts - 1).clamp_min(0)]
    gap = torch.where(counts > 1, (last - known[:, 0]) / (counts - 1).clamp_min(1), 1.0)
    beyond = torch.arange(t.shape[1]) - (counts - 1).unsqueeze(1)
    return torch.where(t.isnan(), last.unsqueeze(1) + beyond * gap.unsqueeze(1), t)


def _on(device: torch.device, steps: Steps) -> Steps:
    t, jumps, base, axis = steps
    return Steps(t.to(device), jumps.to(device), base.to(device), axis)


def _spread(values: Tensor, axis: int | None, dim: int) -> Tensor:
    """Return () or (C,) in a shape that broadcasts along the channels of a tensor with dim axes."""
    if axis is None:
        return values
    shape = [1] * dim
    shape[axis % dim] = -1
    return values.reshape(shape)


def median_distance(gap: Tensor) -> Tensor:
    """Return each image's median distance from zero, (N, 1, ...), the width of a step at zero.

    On a 1-bit net written with signs 43 images survive, as many as with our own quantizers; with
    half the standard deviation 57, with half the root mean square 50.
    """
    rows = gap.detach().flatten(1) if gap.dim() > 1 else gap.detach().reshape(-1, 1)
    distance = (rows if rows.dtype == torch.float64 else rows.float()).abs()
    return typical(distance).to(gap.dtype).reshape(-1, *[1] * (gap.dim() - 1))


def soften(z: Tensor, steps: Steps, k: float, by_image: bool = False) -> Tensor:
    """Return the softened steps at z, as attacks soften our own quantizers.

    See :func:`quantguard.nn.functional.staircase.soft_jumps`. More than 15 thresholds are replaced
    by the line through them.

    Args:
        z: (N, ...), floating point.
        k: sharpness, positive and dimensionless.
        by_image: as of :func:`quantguard.soften`.
    """
    steps = _on(z.device, steps)
    if steps.thresholds.shape[-1] > MOST_SOFTENED:
        return _line(z, steps)
    t, jumps, base, axis = steps
    # As our own quantizers are calibrated: if the lowest level is 0, a step is twice as wide as the
    # first threshold.
    width = torch.where((t[..., 0] > 0) & (base == 0), 2 * t[..., 0], jumps[..., 0].abs())
    return soft_jumps(z, t, jumps, base, width.clamp_min(1e-6), k, axis, by_image)


def _ends(z: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return first and last edge of the steps, their total height, and base, broadcast with z."""
    t, axis = steps.thresholds, steps.axis
    if t.shape[-1] == 1:
        middle = _spread(t[..., 0], axis, z.dim()).to(z)
        half = median_distance(z - middle)
        low, high = middle - half, middle + half
    else:
        edges = windows(t, t.new_ones(t.shape[:-1])).edges
        low, high = (_spread(v, axis, z.dim()).to(z) for v in (edges[..., 0], edges[..., -1]))
    height, base = (_spread(v, axis, z.dim()).to(z) for v in (steps.jumps.sum(-1), steps.base))
    return low, high, height, base


def _line(z: Tensor, steps: Steps) -> Tensor:
    """Return the line through the steps at z, constant beyond their edges."""
    low, high, height, base = _ends(z, steps)
    line: Tensor = base + height * ((z - low) / (high - low)).clamp(0, 1)
    return line


class _Slope(torch.autograd.Function):
    """Zeros whose gradient in z is the mean slope of the steps between their outer edges."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, steps: Steps) -> Tensor:
        low, high, height, _ = _ends(z, steps)
        ctx.save_for_backward(((z > low) & (z < high)) * (height / (high - low)))
        return torch.zeros_like(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None


def slope(z: Tensor, steps: Steps) -> Tensor:
    """Return zeros in z's shape whose gradient in z is that of the line through the steps."""
    steps = _on(z.device, steps)
    return _Slope.apply(z, steps)  # type: ignore[no-any-return]
