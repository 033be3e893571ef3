"""Windows of thresholds, in which the surrogate gradient is not zero, and their slopes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# More equally spaced thresholds than this are not compared one by one: the level is computed.
_COMPARE_UP_TO = 7
# An image's median distance from a threshold is taken over about so many of its numbers, and is
# clamped to so many gaps between thresholds.
_SAMPLED, _MAX_GAPS = 128, 2.5
# A median of fewer numbers is meaningless: that of one number is its own distance.
_MIN_NUMBERS = 16
# Smaller steps lose digits when they are multiplied.
_TINY = 1e-30


class Windows(NamedTuple):
    """Windows of thresholds: edges (..., m + 1) ascending, widths (..., m) positive."""

    edges: Tensor
    widths: Tensor


def windows(t: Tensor, width: Tensor) -> Windows:
    """Return the windows of thresholds t.

    Window i goes from midpoint to midpoint of neighbouring thresholds, so that w_i is the mean of
    the two adjacent gaps. The gaps at the ends are repeated outwards. A single threshold has the
    window ``width``.

    Args:
        t: (..., m), ascending.
        width: (...), used only where m is 1.
    """
    if t.shape[-1] == 1:
        half = (width / 2).unsqueeze(-1)
        return Windows(torch.cat([t - half, t + half], -1), width.unsqueeze(-1).expand_as(t))
    middles = (t[..., 1:] + t[..., :-1]) / 2
    gaps = t[..., 1:] - t[..., :-1]
    first, last = t[..., :1] - gaps[..., :1] / 2, t[..., -1:] + gaps[..., -1:] / 2
    edges = torch.cat([first, middles, last], -1)
    widths = edges[..., 1:] - edges[..., :-1]
    # Widths of equally spaced thresholds differ by rounding. They are made equal, since one slope
    # needs no look-up.
    mean = widths.mean(-1, keepdim=True)
    equal = ((widths - mean).abs() <= 1e-5 * mean).all(-1, keepdim=True)
    return Windows(edges, torch.where(equal, mean, widths))


def typical(distances: Tensor) -> Tensor:
    """Return the median of each row of (N, values), positive; the mean where the median is 0."""
    middle = distances.median(1).values
    return torch.where(middle > 0, middle, distances.mean(1)).clamp_min(1e-6)


def gap_windows(x: Tensor, t: Tensor, axis: int | None, width: Tensor) -> list[Tensor]:
    """Return the widths of :func:`windows` in the form of :func:`image_windows`."""
    gaps = windows(t, width.expand(t.shape[:-1])).widths
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    one = [len(x)] + [1] * (x.dim() - 1)
    return [gap.reshape(shape) * x.new_ones(one) for gap in gaps.unbind(-1)]


def image_windows(x: Tensor, t: Tensor, axis: int | None, width: Tensor) -> list[Tensor]:
    """Return m window widths, one for each threshold, with a value for each image.

    The width is the median distance of an image's numbers from the threshold. It is clamped to a
    number of gaps between thresholds, since a layer with outliers would otherwise be softened more
    than the others. Per channel the distance is measured in gaps. A single threshold has no gap,
    and its width is the median distance.

    Args:
        x: (N, ...).
        t: (m,), or (C, m) along axis; ascending.
        width: (), or (C,), for single thresholds of images with too few numbers.
    """
    if x[0].numel() < _MIN_NUMBERS:
        return gap_windows(x, t, axis, width)
    rows = x.detach().reshape(len(x), -1, 1) if axis is None else \
        x.detach().movedim(axis, -1).reshape(len(x), -1, x.shape[axis])
    rows = rows[:, ::max(1, rows.shape[1] * rows.shape[2] // _SAMPLED)]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    shape = [len(x)] + [1] * (x.dim() - 1)
    gaps = windows(t, torch.ones_like(t[..., 0])).widths
    found = []
    for i in range(t.shape[-1]):
        away = (rows - t[..., i]).abs()
        if axis is not None and t.shape[-1] > 1:
            away = away / gaps[..., i]
        width = typical(away.flatten(1)).reshape(shape)
        if t.shape[-1] > 1 and axis is None:
            width = width.clamp_max(_MAX_GAPS * float(gaps[i]))
        elif t.shape[-1] > 1:
            spread = [1] * x.dim()
            spread[axis] = -1  # type: ignore[index]
            width = width.clamp_max(_MAX_GAPS) * gaps[..., i].reshape(spread)
        found.append(width)
    return found


class SlopeTables(NamedTuple):
    """Windows and slopes of one staircase, as the passes over memory need them.

    Attributes:
        edges: (..., m + 1), between them the windows.
        widths: (..., m), of the windows.
        slopes: (..., m), dq/dx in each window.
        table: (..., m + 2), slopes with that below all windows in front and that above at the end.
        computed: whether t_i is ``step * (i - 1/2 - zero)`` to the bit, i = 1..m, m > 7.
    """

    edges: Tensor
    widths: Tensor
    slopes: Tensor
    table: Tensor
    computed: bool


def slope_tables(t: Tensor, step: Tensor, width: Tensor, zero: Tensor, mode: str) -> SlopeTables:
    """Return the windows and slopes of a staircase; those of recent values are cached."""
    if t.device.type != "meta" and t.dim() == 1 and t.dtype == torch.float32:
        # Waiting for a GPU once takes less time than many small operations on it.
        *places, size, window, level = torch.cat(
            [t, *(v.reshape(1) for v in (step, width, zero))]).tolist()
        return _cached_tables(tuple(places), size, window, level, mode, t.device)
    return _compute_tables(t, step, width, zero, mode)


@functools.lru_cache(256)
def _cached_tables(t: tuple[float, ...], step: float, width: float, zero: float, mode: str,
          device: torch.device) -> SlopeTables:
    with torch.inference_mode(False), torch.no_grad():
        size, window, level = map(torch.tensor, (step, width, zero))
        found = _compute_tables(torch.tensor(t), size, window, level, mode)
        return SlopeTables(found.edges.to(device), found.widths.to(device), found.slopes.to(device),
                      found.table.to(device), found.computed)


def _compute_tables(t: Tensor, step: Tensor, width: Tensor, zero: Tensor, mode: str) -> SlopeTables:
    edges, widths = windows(t, width)
    m, size = t.shape[-1], step.unsqueeze(-1)
    slopes = size / widths
    if mode != "ramp":
        slopes = (m * step / (edges[..., -1] - edges[..., 0])).unsqueeze(-1).expand_as(widths)
    everywhere = mode == "parent"  # the slope continues beyond the outer edges
    table = torch.cat([slopes[..., :1] * everywhere, slopes, slopes[..., -1:] * everywhere], -1)
    computed = False
    if m > _COMPARE_UP_TO and t.device.type == "cpu":
        regular = size * (torch.arange(1, m + 1) - 0.5 - zero)
        computed = torch.equal(t, regular) and bool(step.min() > _TINY)
    return SlopeTables(edges, widths, slopes, table, computed)


def resampled(t: Tensor, step: Tensor, zero: Tensor, width: Tensor,
              m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return thresholds, step, zero and width of a staircase with m thresholds and the same range.

    The new thresholds interpolate the old ones as a function of the level, extended by one gap
    at either end. The lowest and the highest level stay.

    Args:
        t: (..., old m), ascending; step, width: (...).
        zero: (), the level that is 0.
    """
    old = t.shape[-1]
    if old > 1:
        first, last = 2 * t[..., :1] - t[..., 1:2], 2 * t[..., -1:] - t[..., -2:-1]
    else:
        first, last = t - width.unsqueeze(-1), t + width.unsqueeze(-1)
    places = torch.cat([first, t, last], -1)  # at the levels -1/2, 1/2, ..., old + 1/2
    wanted = (torch.arange(m, device=t.device) + 0.5) * (old / m) + 0.5
    left = wanted.long().clamp(0, old)
    share = wanted - left
    new = places[..., left] + share * (places[..., left + 1] - places[..., left])
    return new, step * (old / m), zero * (m / old), width * (old / m)
