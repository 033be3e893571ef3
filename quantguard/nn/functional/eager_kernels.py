"""Passes over memory of the staircase in plain torch operations, block by block.

They need no compiler. A block is small enough that the results of its operations stay in the
cache. Arguments are those of the functions of the same name in ``compiled_kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .level_search import COMPARE_UP_TO, Cells, count_below, count_by_formula
from .memory_blocks import cache_blocks
from .per_channel import histogram, look_up, spread, sum_to

# Arguments of sigmoids are clamped to it: the sigmoid is 1 long before, and exp(-FAR) is not yet a
# denormal number, on which a CPU is slow.
FAR = 80.0
# Arguments beyond it make a sigmoid 0 or 1 in float32.
_REACH = 17.0


def encode(x: Tensor, t: Tensor, edges: Tensor, step: Tensor, zero: Tensor, axis: int | None,
           computed: bool, out: Tensor, code: Tensor | None) -> None:
    """Do what ``compiled_kernels.encode`` does; code None: not wanted."""
    size, m = spread(step.unsqueeze(-1), x, axis)[0], t.shape[-1]
    many = axis is None and m > COMPARE_UP_TO and not computed
    cells = Cells.of(t) if many else None
    for xs, ys, *cs in cache_blocks(*[v for v in (x, out, code) if v is not None], axis=axis):
        xs = xs.float()
        if computed:
            level = count_by_formula(xs, size, float(zero), m)
        elif cells is not None:
            level = cells.below(xs)
        else:
            level = count_below(xs, t, axis)
        for place in cs:
            if computed:
                edge = (level - 0.5 - float(zero)).mul_(size)
                edge.add_((level + 0.5 - float(zero)).mul_(size)).div_(2)
                first, last = (spread(edges[..., i : i + 1], x, axis)[0] for i in (0, m))
                edge = torch.where(level > m - 1, last, torch.where(level < 1, first, edge))
                _write(torch.gt(xs, edge, out=edge).add_(level, alpha=2).nan_to_num_(0.0), place)
            elif cells is not None:
                edge = look_up(edges, level, axis)
                _write(torch.gt(xs, edge, out=edge).add_(level, alpha=2), place)
            else:
                _write(count_below(xs, edges, axis).add_(level), place)
        _values(level, xs, size, zero, ys)


def _write(values: Tensor, code: Tensor) -> None:
    """Write codes, by way of int16: the conversion from float to uint8 is not vectorised."""
    code.copy_(values.short() if code.dtype == torch.uint8 else values)


def decode(grad: Tensor, code: Tensor, derivative: Tensor | None, table: Tensor, zero: Tensor,
           axis: int | None, out: Tensor | None, by_window: Tensor | None,
           by_level: Tensor | None) -> None:
    """Do what ``compiled_kernels.decode`` does; out and by_window use grad times derivative."""
    m = table.shape[-1] - 2
    codes = 2 * m + 2
    one_slope = None  # a table with one slope needs no look-up
    if axis is None and grad.device.type == "cpu" and bool((table[1:-1] == table[1]).all()):
        one_slope = float(table[1])
    everywhere = bool((table[..., 0] == table[..., 1]).all())
    by_code = torch.cat([table[..., :1], table[..., 1:-1].repeat_interleave(2, -1),
                         table[..., -1:]], -1)
    level = torch.arange(codes, device=grad.device) // 2 - zero
    blocks = [v for v in (grad, code, out, derivative) if v is not None]
    for gs, cs, *rest in cache_blocks(*blocks, axis=axis):
        gs = gs.float()
        sums = None if by_level is None else histogram(gs, cs, codes, axis)
        if by_level is not None and sums is not None:
            by_level += (sums * level).sum(-1)
        if derivative is not None:
            gs, sums = gs * rest[-1], None
        if by_window is not None:
            through = (histogram(gs, cs, codes, axis) if sums is None else sums)[..., 1:-1]
            by_window += through.reshape((*by_window.shape, 2)).sum(-1)
        if out is None:
            continue
        if one_slope is None:
            rest[0].copy_(gs * look_up(by_code, cs, axis))
        elif everywhere:
            torch.mul(gs, one_slope, out=rest[0])
        else:
            wide = cs.float()
            inside = torch.gt(wide, 0, out=torch.empty_like(wide))
            inside.sub_(wide.gt_(2 * m)).mul_(one_slope)
            rest[0].copy_(inside.mul_(gs))


def bell(x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor, zero: Tensor, hard: bool,
         axis: int | None, reach: int | None, out: Tensor, slope: Tensor | None) -> None:
    """Do what ``compiled_kernels.bell`` does, also per channel and to the last element."""
    one_step = spread(step.unsqueeze(-1), x, axis)[0]
    for xs, ys, *ss in cache_blocks(*[v for v in (x, out, slope) if v is not None], axis=axis):
        wide = xs.float()
        if ss or not hard:
            value, below, bells = (torch.zeros_like(wide) for _ in range(3))
            near = _sigmoids(wide, t, sharpness, axis, below) if reach is None else \
                _sigmoids_computed(wide, t.shape[-1], sharpness, step, zero, reach, below)
            for _, s, sharp in near:
                value.add_(s)
                if ss:
                    # Each operation rounds, as in compiled code.
                    bells.add_((1 - s).mul_(s).mul_(sharp))
            for steep in ss:
                steep.copy_(bells.mul_(one_step))
        if hard:
            _values(count_below(wide, t, axis), wide, one_step, zero, ys)
        else:
            ys.copy_(value.add_(below).sub_(zero).mul_(one_step))


def bell_gradients(grad: Tensor, x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor,
                   zero: Tensor, hard: bool, axis: int | None, out: Tensor, shares: Tensor,
                   by_level: Tensor) -> None:
    """Do what ``compiled_kernels.bell_gradients`` does, also per channel."""
    one_step, m = spread(step.unsqueeze(-1), x, axis)[0], t.shape[-1]
    for gs, xs, outs in cache_blocks(grad, x, out, axis=axis):
        wide, up = xs.float(), gs.float()
        total, value, below = (torch.zeros_like(wide) for _ in range(3))
        steep = up * one_step
        for i, s, sharp in _sigmoids(wide, t, sharpness, axis, below):
            part = (1 - s).mul_(s).mul_(sharp).mul_(steep)  # each operation rounds, as compiled
            if isinstance(i, int):
                shares[..., i] -= sum_to(part, axis)
            else:  # the shares beyond either end are zero
                shares -= torch.bincount(i.clamp_(0, m - 1), part.reshape(-1), m)
            total.add_(part)
            value.add_(s)
        outs.copy_(total)
        level = count_below(wide, t, axis) if hard else value.add_(below)
        by_level += sum_to(level.sub_(zero).mul_(up), axis)


def margin(z: Tensor, t: Tensor, sharpness: Tensor, slope: Tensor, total: Tensor) -> None:
    """Do what ``compiled_kernels.margin`` does, to the last element."""
    for zs, slopes in cache_blocks(z, slope, axis=None):
        wide = zs if zs.dtype == torch.float64 else zs.float()
        steep = torch.zeros_like(wide)
        for center, sharp in zip(spread(t, wide, None), spread(sharpness, wide, None),
                                 strict=True):
            p = torch.sub(wide, center).mul_(sharp).clamp_(max=FAR).sigmoid_()
            bell = (1 - p).mul_(p)
            total += bell.sum(dtype=torch.float64)
            steep.add_(bell.mul_(p.mul_(-2).add_(1)).mul_(sharp))
        slopes.copy_(steep)


def _values(count: Tensor, x: Tensor, step: Any, zero: Tensor, out: Tensor) -> None:
    """Write ``step * (count - zero)`` into out and overwrite count; NaN stays NaN, as in ReLU."""
    value = count.sub_(zero).mul_(step)
    # On a CPU a check for NaN is much cheaper than masking; on a GPU it would wait for the device.
    if x.device.type != "cpu" or (x.numel() and bool(x.amax().isnan())):
        value.masked_fill_(x != x, float("nan"))
    out.copy_(value)


def _reach(t: Tensor, sharpness: Tensor) -> int:
    """Return the largest number of thresholds at which another one's sigmoid is not yet 0 or 1."""
    far, index = _REACH / sharpness, torch.arange(t.shape[-1], device=t.device)
    right = torch.searchsorted(t, t + far, right=True) - index
    left = index - torch.searchsorted(t, t - far)
    return int(torch.maximum(left, right).max()) + 1


def _sigmoids(wide: Tensor, t: Tensor, sharpness: Tensor, axis: int | None,
              below: Tensor) -> Iterator[tuple[Any, Tensor, Any]]:
    """Yield (index i, sigmoid s_i, sharpness_i) of the thresholds near each element.

    Of few thresholds all are yielded, and i is a number. Of many only those within reach are, and
    i is a tensor; the other sigmoids are 0 or 1 in float32, and the number of ones is written into
    ``below``.
    """
    m = t.shape[-1]
    reach = m if axis is not None or m <= 8 else _reach(t, sharpness)
    if m <= 4 * reach + 2:
        for i, (center, sharp) in enumerate(zip(spread(t, wide, axis),
                                                spread(sharpness, wide, axis), strict=True)):
            yield i, torch.sub(wide, center).mul_(sharp).clamp_(max=FAR).sigmoid_(), sharp
        return
    end = t.new_full((reach,), math.inf)
    centers = torch.cat([end, t, end])
    sharps = torch.cat([end.zero_(), sharpness, end])
    # Clamped: nothing changes beyond the last thresholds, and inf - inf would be NaN.
    inside = wide.clamp(float(t[0]) - 100 / float(sharpness[0]),
                        float(t[-1]) + 100 / float(sharpness[-1]))
    first = torch.bucketize(inside, t, out_int32=True)
    below.copy_(first).sub_(reach).clamp_(min=0)
    first = first.reshape(-1)
    for offset in range(2 * reach):
        index = first + offset
        sharp = sharps.index_select(0, index).reshape(wide.shape)
        center = centers.index_select(0, index).reshape(wide.shape)
        s = torch.where(center.isinf(), 0.0, (inside - center) * sharp).clamp_(max=FAR).sigmoid_()
        s.masked_fill_(center.isinf(), 0.0)
        yield index - reach, s, sharp


def _sigmoids_computed(wide: Tensor, m: int, sharpness: Tensor, step: Tensor, zero: Tensor,
                       reach: int, below: Tensor) -> Iterator[tuple[Any, Tensor, Any]]:
    """Do what :func:`_sigmoids` does where t_i is ``step * (i - 1/2 - zero)`` to the bit."""
    level, sharp, size = float(zero), float(sharpness[0]), float(step)
    first = (wide / size).add_(level + 0.5).floor_().clamp_(-reach, m + reach)
    torch.sub(first, reach, out=below).clamp_(0, m)
    for offset in range(1 - reach, reach + 1):
        i = first + offset
        s = (wide - (i - 0.5 - level).mul_(size)).mul_(sharp).clamp_(max=FAR).sigmoid_()
        # No threshold lies beyond either end; NaN stays NaN.
        yield i, s.mul_((i > 0).logical_and_(i <= m).logical_or_(i != i)), sharp
