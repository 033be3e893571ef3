"""Where a staircase has slope: each threshold's window, and what its passes need of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# More equally spaced thresholds than this are computed, not compared with one by one.
_COMPARE_UP_TO = 7
# Numbers of an image that its median distance from a threshold is taken of, about; and how many
# gaps between thresholds it is at most.
_GLANCE, _GAPS = 128, 2.5
# Of fewer numbers a median says nothing: of one it is always as far from the threshold as it is.
_TELLING = 16
# Steps below this lose digits when they are multiplied.
_TINY = 1e-30


class Windows(NamedTuple):
    """Hold each threshold's window: edges (..., m + 1) ascending, widths (..., m) positive."""

    edges: Tensor
    widths: Tensor


def windows(t: Tensor, width: Tensor) -> Windows:
    """Return the windows of thresholds t.

    Window i runs from midpoint to midpoint of neighbouring thresholds, the end gaps repeated
    outwards, so that w_i is the mean of the two adjacent gaps; one threshold alone has ``width``.

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
    # Equally spaced thresholds have one width, which rounding hides: one slope needs no look-up.
    mean = widths.mean(-1, keepdim=True)
    equal = ((widths - mean).abs() <= 1e-5 * mean).all(-1, keepdim=True)
    return Windows(edges, torch.where(equal, mean, widths))


def typical(distances: Tensor) -> Tensor:
    """Return each row's median, (N,) of (N, values), positive; its mean where half of it is 0."""
    middle = distances.median(1).values
    return torch.where(middle > 0, middle, distances.mean(1)).clamp_min(1e-6)


def gap_windows(x: Tensor, t: Tensor, axis: int | None, width: Tensor) -> list[Tensor]:
    """Return the window of each threshold by :func:`windows`, as :func:`image_windows` does."""
    gaps = windows(t, width.expand(t.shape[:-1])).widths
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    one = [len(x)] + [1] * (x.dim() - 1)
    return [gap.reshape(shape) * x.new_ones(one) for gap in gaps.unbind(-1)]


def image_windows(x: Tensor, t: Tensor, axis: int | None, width: Tensor) -> list[Tensor]:
    """Return the window of each threshold for each image, m of them, each broadcasts with x.

    The median distance of an image's numbers from the threshold, but not more than so many gaps
    between thresholds: layers differ in where and how wide they lie, and a window that is misled
    by that softens one layer more than the next. Per channel it is a number of gaps, the image's
    median of them; of single thresholds, whose channels have no gap, the median distance.

    Args:
        x: (N, ...).
        t: (m,), or (C, m) along axis; ascending.
        width: (), or (C,), of single thresholds where an image has too few numbers to tell.
    """
    if x[0].numel() < _TELLING:
        return gap_windows(x, t, axis, width)
    rows = x.detach().reshape(len(x), -1, 1) if axis is None else \
        x.detach().movedim(axis, -1).reshape(len(x), -1, x.shape[axis])
    rows = rows[:, ::max(1, rows.shape[1] * rows.shape[2] // _GLANCE)]
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
            width = width.clamp_max(_GAPS * float(gaps[i]))
        elif t.shape[-1] > 1:
            spread = [1] * x.dim()
            spread[axis] = -1  # type: ignore[index]
            width = width.clamp_max(_GAPS) * gaps[..., i].reshape(spread)
        found.append(width)
    return found


class Placed(NamedTuple):
    """Hold what the passes of one staircase need.

    Attributes:
        edges: (..., m + 1), between them the windows.
        widths: (..., m), of the windows.
        slopes: (..., m), dq/dx in each window.
        table: (..., m + 2), the slopes between that below all windows and that above.
        computed: whether t_i is ``step * (i - 1/2 - zero)`` to the bit, i = 1..m, m > 7.
    """

    edges: Tensor
    widths: Tensor
    slopes: Tensor
    table: Tensor
    computed: bool


def placed(t: Tensor, step: Tensor, width: Tensor, zero: Tensor, mode: str) -> Placed:
    """Work out the windows and slopes of a staircase; the last ones are kept, by their values."""
    if t.device.type != "meta" and t.dim() == 1 and t.dtype == torch.float32:
        # to wait for a GPU once takes less time than the many small steps of working it out
        *places, size, window, level = torch.cat(
            [t, *(v.reshape(1) for v in (step, width, zero))]).tolist()
        return _kept(tuple(places), size, window, level, mode, t.device)
    return _worked_out(t, step, width, zero, mode)


@functools.lru_cache(256)
def _kept(t: tuple[float, ...], step: float, width: float, zero: float, mode: str,
          device: torch.device) -> Placed:
    with torch.inference_mode(False), torch.no_grad():
        size, window, level = map(torch.tensor, (step, width, zero))
        found = _worked_out(torch.tensor(t), size, window, level, mode)
        return Placed(found.edges.to(device), found.widths.to(device), found.slopes.to(device),
                      found.table.to(device), found.computed)


def _worked_out(t: Tensor, step: Tensor, width: Tensor, zero: Tensor, mode: str) -> Placed:
    edges, widths = windows(t, width)
    m, size = t.shape[-1], step.unsqueeze(-1)
    slopes = size / widths
    if mode != "ramp":
        slopes = (m * step / (edges[..., -1] - edges[..., 0])).unsqueeze(-1).expand_as(widths)
    everywhere = mode == "parent"  # its slope does not end at the outer edges
    table = torch.cat([slopes[..., :1] * everywhere, slopes, slopes[..., -1:] * everywhere], -1)
    computed = False
    if m > _COMPARE_UP_TO and t.device.type == "cpu":
        regular = size * (torch.arange(1, m + 1) - 0.5 - zero)
        computed = torch.equal(t, regular) and bool(step.min() > _TINY)
    return Placed(edges, widths, slopes, table, computed)


def resampled(t: Tensor, step: Tensor, zero: Tensor, width: Tensor,
              m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return thresholds, step, zero and width of a staircase with m thresholds and the same range.

    The new thresholds lie on the line through the old ones, level over place, carried on beyond
    them; the lowest and the highest level stay.

    Args:
        t: (..., old m), ascending; step, width: (...).
        zero: (), the level that is 0.
    """
    old = t.shape[-1]
    if old > 1:
        first, last = 2 * t[..., :1] - t[..., 1:2], 2 * t[..., -1:] - t[..., -2:-1]
    else:
        first, last = t - width.unsqueeze(-1), t + width.unsqueeze(-1)
    places = torch.cat([first, t, last], -1)  # of the levels -1/2, 1/2, ..., old + 1/2
    wanted = (torch.arange(m, device=t.device) + 0.5) * (old / m) + 0.5
    left = wanted.long().clamp(0, old)
    share = wanted - left
    new = places[..., left] + share * (places[..., left + 1] - places[..., left])
    return new, step * (old / m), zero * (m / old), width * (old / m)
