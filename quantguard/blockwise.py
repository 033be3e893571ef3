"""The staircase's passes over memory, block by block: no compiler, a block stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain import count_by_search

# Up to here a comparison per boundary beats looking an element up.
_COMPARE_UP_TO = 31
# Thresholds in one cell of a grid: more, and a binary search is faster.
_FULLEST = 6
_TINY = 1e-30
# A sigmoid is 1 long before, and exp(-FAR) is still no denormal number, on which a CPU is slow.
FAR = 80.0
# A sigmoid this far from its threshold, times sharpness, is 0 or 1 to float32.
_REACH = 17.0
# Elements per block: most of what is between its operations stays in the cache, and each operation
# is long enough for the threads that share it.
BLOCK = 1 << 19


def encode(x: Tensor, t: Tensor, edges: Tensor, step: Tensor, zero: Tensor, axis: int | None,
           computed: bool, out: Tensor, code: Tensor | None) -> None:
    """Do what ``fused.encode`` does; without code, only what inference needs of it."""
    size, m = _spread(step.unsqueeze(-1), x, axis)[0], t.shape[-1]
    many = axis is None and m > _COMPARE_UP_TO and not computed
    cells = Cells.of(t) if many else None
    for xs, ys, *cs in _blocks(*[v for v in (x, out, code) if v is not None], axis=axis):
        xs = xs.float()
        if computed:
            level = _computed(xs, size, float(zero), m)
        elif cells is not None:
            level = cells.below(xs)
        else:
            level = _count(xs, t, axis)
        for place in cs:
            if computed:
                edge = (level - 0.5 - float(zero)).mul_(size)
                edge.add_((level + 0.5 - float(zero)).mul_(size)).div_(2)
                first, last = (_spread(edges[..., i : i + 1], x, axis)[0] for i in (0, m))
                edge = torch.where(level > m - 1, last, torch.where(level < 1, first, edge))
                _write(torch.gt(xs, edge, out=edge).add_(level, alpha=2).nan_to_num_(0.0), place)
            elif cells is not None:
                edge = _look_up(edges, level, axis)
                _write(torch.gt(xs, edge, out=edge).add_(level, alpha=2), place)
            else:
                _write(_count(xs, edges, axis).add_(level), place)
        _values(level, xs, size, zero, ys)


def _write(values: Tensor, code: Tensor) -> None:
    """Write codes; by way of int16, since from float to uint8 is not vectorised."""
    code.copy_(values.short() if code.dtype == torch.uint8 else values)


def decode(grad: Tensor, code: Tensor, derivative: Tensor | None, table: Tensor, zero: Tensor,
           axis: int | None, out: Tensor | None, by_window: Tensor | None,
           by_level: Tensor | None) -> None:
    """Do what ``fused.decode`` does; out and by_window see grad times derivative."""
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
    for gs, cs, *rest in _blocks(*blocks, axis=axis):
        gs = gs.float()
        sums = None if by_level is None else _histogram(gs, cs, codes, axis)
        if by_level is not None and sums is not None:
            by_level += (sums * level).sum(-1)
        if derivative is not None:
            gs, sums = gs * rest[-1], None
        if by_window is not None:
            through = (_histogram(gs, cs, codes, axis) if sums is None else sums)[..., 1:-1]
            by_window += through.reshape((*by_window.shape, 2)).sum(-1)
        if out is None:
            continue
        if one_slope is None:
            rest[0].copy_(gs * _look_up(by_code, cs, axis))
        elif everywhere:
            torch.mul(gs, one_slope, out=rest[0])
        else:
            wide = cs.float()
            inside = torch.gt(wide, 0, out=torch.empty_like(wide))
            inside.sub_(wide.gt_(2 * m)).mul_(one_slope)
            rest[0].copy_(inside.mul_(gs))


def bell(x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor, zero: Tensor, hard: bool,
         axis: int | None, reach: int | None, out: Tensor, slope: Tensor | None) -> None:
    """Do what ``fused.bell`` does; slope None: it is not wanted."""
    one_step = _spread(step.unsqueeze(-1), x, axis)[0]
    for xs, ys, *ss in _blocks(*[v for v in (x, out, slope) if v is not None], axis=axis):
        wide = xs.float()
        if ss or not hard:
            value, below, bells = (torch.zeros_like(wide) for _ in range(3))
            near = _sigmoids(wide, t, sharpness, axis, below) if reach is None else \
                _sigmoids_computed(wide, t.shape[-1], sharpness, step, zero, reach, below)
            for _, s, sharp in near:
                value.add_(s)
                if ss:
                    # rounded after each operation, as compiled code does
                    bells.add_((1 - s).mul_(s).mul_(sharp))
            for steep in ss:
                steep.copy_(bells.mul_(one_step))
        if hard:
            _values(_count(wide, t, axis), wide, one_step, zero, ys)
        else:
            ys.copy_(value.add_(below).sub_(zero).mul_(one_step))


def bell_gradients(grad: Tensor, x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor,
                   zero: Tensor, hard: bool, axis: int | None, out: Tensor, shares: Tensor,
                   by_level: Tensor) -> None:
    """Do what ``fused.bell_gradients`` does, per channel too."""
    one_step, m = _spread(step.unsqueeze(-1), x, axis)[0], t.shape[-1]
    for gs, xs, outs in _blocks(grad, x, out, axis=axis):
        wide, up = xs.float(), gs.float()
        total, value, below = (torch.zeros_like(wide) for _ in range(3))
        steep = up * one_step
        for i, s, sharp in _sigmoids(wide, t, sharpness, axis, below):
            part = (1 - s).mul_(s).mul_(sharp).mul_(steep)  # as compiled: each operation rounds
            if isinstance(i, int):
                shares[..., i] -= sum_to(part, axis)
            else:  # those off either end are zero
                shares -= torch.bincount(i.clamp_(0, m - 1), part.reshape(-1), m)
            total.add_(part)
            value.add_(s)
        outs.copy_(total)
        level = _count(wide, t, axis) if hard else value.add_(below)
        by_level += sum_to(level.sub_(zero).mul_(up), axis)


def near(z: Tensor, t: Tensor, sharpness: Tensor, slope: Tensor, total: Tensor) -> None:
    """Do what ``fused.near`` does, to the last element."""
    for zs, slopes in _blocks(z, slope, axis=None):
        wide = zs if zs.dtype == torch.float64 else zs.float()
        steep = torch.zeros_like(wide)
        for center, sharp in zip(_spread(t, wide, None), _spread(sharpness, wide, None),
                                 strict=True):
            p = torch.sub(wide, center).mul_(sharp).clamp_(max=FAR).sigmoid_()
            bell = (1 - p).mul_(p)
            total += bell.sum(dtype=torch.float64)
            steep.add_(bell.mul_(p.mul_(-2).add_(1)).mul_(sharp))
        slopes.copy_(steep)


def dense(x: Tensor) -> Tensor:
    """Return x with gapless strides, in its own memory order where it has one."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x if x.permute(order).is_contiguous() else x.contiguous()


def without_denormals(x: Tensor) -> Tensor:
    """Return x with zeros for denormal numbers, on a CPU.

    Slopes far from a threshold make them, and a convolution takes far longer even where few numbers
    are denormal.
    """
    if x.device.type != "cpu" or x.dtype == torch.float16:  # of which many are, and count
        return x
    return torch.hardshrink(x, torch.finfo(x.dtype).tiny)


def left(done: int, *tensors: Tensor) -> list[Any]:
    """Return what is left of tensors of one gapless layout after so many elements of memory."""
    if not done:
        return list(tensors)
    return [v.reshape(-1)[done:] for v in in_memory_order(*tensors)]


def in_memory_order(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one gapless layout with their dimensions in memory order."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    return [x.permute(order) for x in tensors]


def _blocks(*tensors: Tensor, axis: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one layout into pieces that stay in cache; flat where no channel matters."""
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


def _spread(values: Tensor, x: Tensor, axis: int | None) -> list[Any]:
    """Return the last dimension of values as a list that broadcasts against blocks of x."""
    if axis is None:
        return list(values.tolist()) if values.device.type == "cpu" else list(values.unbind(-1))
    shape = [1] * x.dim()
    shape[axis] = -1
    return [v.reshape(shape) for v in values.unbind(-1)]


def _count(x: Tensor, bounds: Tensor, axis: int | None) -> Tensor:
    """Return, for each element of the block x, how many of the ascending bounds are < x.

    As float32: comparisons that put out floats and their sums are vectorised on CPU, those that
    put out booleans are not, and take several times as long.
    """
    if bounds.shape[-1] <= _COMPARE_UP_TO:
        first, *rest = _spread(bounds, x, axis)
        count = torch.gt(x, first, out=torch.empty_like(x))
        above = torch.empty_like(x)
        for bound in rest:
            count.add_(torch.gt(x, bound, out=above))
        return count
    return count_by_search(x, bounds, axis)


def _values(count: Tensor, x: Tensor, step: Any, zero: Tensor, out: Tensor) -> None:
    """Write ``step * (count - zero)`` into out, using count up; NaN stays NaN, as in ReLU."""
    value = count.sub_(zero).mul_(step)
    # On CPU a look for NaN is much cheaper than masking; elsewhere it would wait for the device.
    if x.device.type != "cpu" or (x.numel() and bool(x.amax().isnan())):
        value.masked_fill_(x != x, float("nan"))
    out.copy_(value)


def _computed(x: Tensor, step: Any, zero: float, m: int) -> Tensor:
    """Return how many of ``step * (i - 1/2 - zero)``, i = 1..m, are < x; NaN for NaN."""
    count = (x / step).add_(zero + 0.5).floor_().clamp_(0, m)  # right, or one off
    bound, found = count + (0.5 - zero), torch.empty_like(x)
    torch.gt(x, bound.mul_(step), out=found)
    torch.sub(count, 0.5 + zero, out=bound)
    count.add_(found).sub_(torch.le(x, bound.mul_(step), out=found))
    result: Tensor = count.clamp_(0, m)
    return result


class Cells(NamedTuple):
    """A grid over many thresholds: an element is compared only with those of its own cell.

    Attributes:
        low, scale: element x is in cell ``floor((x - low) * scale)``, clamped.
        before: (cells,), how many thresholds lie in cells further left.
        t: thresholds, and one infinity.
        most: thresholds in the fullest cell.
    """

    low: float
    scale: float
    before: Tensor
    t: Tensor
    most: int

    @classmethod
    def of(cls, t: Tensor) -> Cells | None:
        """Return the grid of thresholds (m,); None where they are too uneven for one."""
        t = t.float()
        low, width = float(t[0]), float(t[-1] - t[0])
        number = 16 * t.shape[-1]
        if t.device.type != "cpu" or not _TINY < width < 1 / _TINY:
            return None
        grid = cls(low, number / width, torch.arange(number, dtype=torch.float32), t, 0)
        cell = grid.cell(t).float()
        most = int(torch.bincount(cell.int()).max())
        if most > _FULLEST:
            return None
        return grid._replace(before=torch.bucketize(grid.before, cell).int(), most=most,
                             t=torch.cat([t, t.new_full((1,), math.inf)]))

    def cell(self, x: Tensor) -> Tensor:
        """Return each element's cell; NaN is in the first."""
        place = (x - self.low).mul_(self.scale)
        torch.fmax(place, place.new_zeros(()), out=place)
        return place.clamp_(max=len(self.before) - 1).int()

    def below(self, x: Tensor) -> Tensor:
        """Return how many thresholds are < x, as float32."""
        flat = x.reshape(-1)
        level = self.before.index_select(0, self.cell(flat))
        above = torch.empty_like(flat)
        for _ in range(self.most):
            torch.gt(flat, self.t.index_select(0, level), out=above)
            level.add_(above.int())
        return level.float().reshape(x.shape)


def sum_to(x: Tensor, axis: int | None) -> Tensor:
    """Sum over all but the channel axis, in double: partial sums of blocks must not drift."""
    if axis is None:
        return x.sum(dtype=torch.float64)
    return x.sum(dim=[d for d in range(x.dim()) if d != axis], dtype=torch.float64)


def _histogram(weights: Tensor, code: Tensor, codes: int, axis: int | None) -> Tensor:
    """Sum weights by code: (codes,), or (C, codes) per channel."""
    weights = weights.double()
    if axis is None:
        places = code if code.dtype == torch.uint8 else code.int()
        return torch.bincount(places.reshape(-1), weights.reshape(-1), minlength=codes)
    rows = code.movedim(axis, 0).flatten(1).long()
    rows += codes * torch.arange(rows.shape[0], device=code.device).unsqueeze(1)
    sums = torch.bincount(rows.reshape(-1), weights.movedim(axis, 0).reshape(-1),
                          minlength=codes * rows.shape[0])
    return sums.reshape(-1, codes)


def _look_up(table: Tensor, code: Tensor, axis: int | None) -> Tensor:
    """Return ``table[..., code]`` elementwise."""
    if axis is None:
        return table.index_select(0, code.reshape(-1).int()).reshape(code.shape)
    rows = code.movedim(axis, 0)
    return table.gather(1, rows.flatten(1).long()).reshape(rows.shape).movedim(0, axis)


def _reach(t: Tensor, sharpness: Tensor) -> int:
    """Return how many thresholds lie, at most, where another one's sigmoid is not yet 0 or 1."""
    far, index = _REACH / sharpness, torch.arange(t.shape[-1], device=t.device)
    right = torch.searchsorted(t, t + far, right=True) - index
    left = index - torch.searchsorted(t, t - far)
    return int(torch.maximum(left, right).max()) + 1


def _sigmoids(wide: Tensor, t: Tensor, sharpness: Tensor, axis: int | None,
              below: Tensor) -> Iterator[tuple[Any, Tensor, Any]]:
    """Yield (index i, s_i, sharpness_i) of the thresholds that are near each element.

    Few thresholds: all of them, i a number. Many: only those within reach, i a tensor; the others'
    s are 0 or 1 to float32, and the ones are written into ``below``.
    """
    m = t.shape[-1]
    reach = m if axis is not None or m <= 8 else _reach(t, sharpness)
    if m <= 4 * reach + 2:
        for i, (center, sharp) in enumerate(zip(_spread(t, wide, axis),
                                                _spread(sharpness, wide, axis), strict=True)):
            yield i, torch.sub(wide, center).mul_(sharp).clamp_(max=FAR).sigmoid_(), sharp
        return
    end = t.new_full((reach,), math.inf)
    centers = torch.cat([end, t, end])
    sharps = torch.cat([end.zero_(), sharpness, end])
    # beyond the last thresholds nothing changes any more, and inf - inf would
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
        # beyond either end there is none; NaN stays NaN
        yield i, s.mul_((i > 0).logical_and_(i <= m).logical_or_(i != i)), sharp
