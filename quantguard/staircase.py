"""The staircase function: its forward, its surrogate gradients, its softened twin.

``q(x) = step * (sum_i 1[x > t_i] - zero)``, i = 1..m, t ascending (Rakin, Yi, Gong, Fan 2018,
arXiv:1807.06714). All functions here are pure: tensors in, tensors out.

Ties go down (``x == t_i`` is not above t_i), +-inf take the outer levels, NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fused, plain

MODES = ("ramp", "ste", "sigmoid", "parent")
# Up to here a comparison per boundary beats a binary search per element.
_COMPARE_UP_TO = 31
# A sigmoid this far from its threshold, times sharpness, is 0 or 1 to float32.
_REACH = 17.0
# Elements per block: a block and its temporaries stay in a core's cache.
_BLOCK = 1 << 17


class Surrogate(NamedTuple):
    """Name the gradient of a staircase: mode, and the dimensionless sharpness k of ``sigmoid``."""

    mode: str = "ramp"
    k: float = 8.0


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


def _in_memory_order(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one gapless layout with their dimensions in memory order."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    return [x.permute(order) for x in tensors]


def _blocks(*tensors: Tensor, axis: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one layout into pieces that stay in cache; flat where no channel matters."""
    first = tensors[0]
    if axis is None:
        flat = [x.reshape(-1) for x in _in_memory_order(*tensors)]
        size = _BLOCK if first.device.type == "cpu" else max(first.numel(), 1)
        for start in range(0, first.numel(), size):
            yield tuple(x[start : start + size] for x in flat)
    elif first.device.type != "cpu" or axis == 0 or first.numel() <= _BLOCK:
        yield tensors
    else:
        rows = max(1, _BLOCK * first.shape[0] // max(first.numel(), 1))
        for start in range(0, first.shape[0], rows):
            yield tuple(x[start : start + rows] for x in tensors)


def _dense(x: Tensor) -> Tensor:
    """Return x with gapless strides, in its own memory order where it has one."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x if x.permute(order).is_contiguous() else x.contiguous()


def _like(x: Tensor, layout: Tensor) -> Tensor:
    """Return x in the memory order of layout."""
    if x.stride() == layout.stride():
        return x
    return torch.empty_strided(layout.shape, layout.stride(), dtype=x.dtype,
                               device=x.device).copy_(x)


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
    return plain.count_by_search(x, bounds, axis)


def _values(count: Tensor, x: Tensor, step: Any, zero: Tensor, out: Tensor) -> None:
    """Write ``step * (count - zero)`` into out, using count up; NaN stays NaN, as in ReLU."""
    value = count.sub_(zero).mul_(step)
    # On CPU a look for NaN is much cheaper than masking; elsewhere it would wait for the device.
    if x.device.type != "cpu" or (x.numel() and bool(x.amax().isnan())):
        value.masked_fill_(x != x, float("nan"))
    out.copy_(value)


def _code_type(m: int) -> torch.dtype:
    return torch.uint8 if 2 * m + 2 <= 256 else torch.int16


def _sum_to(x: Tensor, axis: int | None) -> Tensor:
    """Sum over all but the channel axis, in double: partial sums of blocks must not drift."""
    if axis is None:
        return x.sum(dtype=torch.float64)
    return x.sum(dim=[d for d in range(x.dim()) if d != axis], dtype=torch.float64)


def _histogram(weights: Tensor, code: Tensor, codes: int, axis: int | None) -> Tensor:
    """Sum weights by code: (codes,), or (C, codes) per channel."""
    weights = weights.double()
    if axis is None:
        return torch.bincount(code.reshape(-1), weights.reshape(-1), minlength=codes)
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


class _Windowed(torch.autograd.Function):
    """The staircase with a slope that is constant inside a window: ``ramp``, ``ste``, ``parent``.

    Backward needs one code an element (window and side; a byte up to 7 bits) and, for ``parent``
    where f is absorbed, a mask of f'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                mode: str, gate: tuple[float, float] | None, axis: int | None) -> Tensor:
        x = _dense(x)
        out = torch.empty_like(x)
        m = t.shape[-1]
        one_step = _spread(step.unsqueeze(-1), x, axis)[0]
        if not any(ctx.needs_input_grad):
            for xs, ys in _blocks(x, out, axis=axis):
                xs = xs.float()
                _values(_count(xs, t, axis), xs, one_step, zero, ys)
            return out
        edges, widths = windows(t, width)
        # edge, threshold, edge, ...: code 2i - 1 is window i left of t_i, 2i right of it.
        code = torch.empty_like(x, dtype=_code_type(m))
        if not fused.encode(x, t, edges, step, zero, axis, out, code):
            for xs, ys, cs in _blocks(x, out, code, axis=axis):
                xs = xs.float()
                level = _count(xs, t, axis)
                cs.copy_(_count(xs, edges, axis).add_(level))
                _values(level, xs, one_step, zero, ys)
        derivative = None
        if mode == "parent" and gate is not None:
            derivative = (x > gate[0]) & (x < gate[1])
        ctx.save_for_backward(code, derivative, step, widths, edges)
        ctx.zero, ctx.mode, ctx.axis = zero, mode, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        code, derivative, step, widths, edges = ctx.saved_tensors
        axis, m = ctx.axis, widths.shape[-1]
        needs_x, needs_t, needs_step, *_ = ctx.needs_input_grad
        grad = _like(grads[0], code)
        slopes = step.unsqueeze(-1) / widths
        if ctx.mode != "ramp":
            slopes = (m * step / (edges[..., -1] - edges[..., 0])).unsqueeze(-1).expand_as(widths)
        everywhere = ctx.mode == "parent"  # its slope does not end at the outer edges
        table = torch.cat([slopes[..., :1] * everywhere, slopes, slopes[..., -1:] * everywhere], -1)
        rows: Any = {"dtype": torch.float64, "device": step.device}
        grad_x = torch.empty_like(grad) if needs_x else None
        by_window = torch.zeros(*widths.shape, **rows) if needs_t else None
        by_level = torch.zeros(step.shape, **rows) if needs_step else None
        if derivative is not None or not fused.decode(grad, code, table, ctx.zero, axis, grad_x,
                                                      by_window, by_level):
            _decode(grad, code, derivative, table, ctx.zero, axis, grad_x, by_window, by_level)
        return (grad_x,
                None if by_window is None else (-by_window * slopes).to(widths.dtype),
                None if by_level is None else by_level.to(step.dtype),
                None, None, None, None, None)


def _decode(grad: Tensor, code: Tensor, derivative: Tensor | None, table: Tensor, zero: Tensor,
            axis: int | None, out: Tensor | None, by_window: Tensor | None,
            by_level: Tensor | None) -> None:
    """Do block by block what ``fused.decode`` does; out and by_window see grad times derivative."""
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
            yield i, torch.sub(wide, center).mul_(sharp).sigmoid_(), sharp
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
        s = torch.where(center.isinf(), 0.0, (inside - center) * sharp).sigmoid_()
        s.masked_fill_(center.isinf(), 0.0)
        yield index - reach, s, sharp


def _add_bell(total: Tensor, s: Tensor, sharp: Any) -> None:
    """Add ``sharp * s (1 - s)`` to total, rounding after each operation as compiled code does."""
    total.add_((s - s * s).mul_(sharp))


class _Bell(torch.autograd.Function):
    """The staircase (hard) or its softened twin, both with the twin's gradient.

    ``dq/dx = sum_i step k/w_i s_i (1 - s_i)``, s_i = sigma(k (x - t_i) / w_i), sigma logistic.
    For x alone the slope is kept; thresholds need every bell apart, so then x is kept instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                k: float, hard: bool, axis: int | None) -> Tensor:
        x = _dense(x)
        out = torch.empty_like(x)
        widths = windows(t, width).widths
        needs_x, needs_t, *_ = ctx.needs_input_grad
        keep_slope = needs_x and not needs_t
        slope = torch.empty_like(x) if keep_slope else None
        sharpness = k / widths
        one_step = _spread(step.unsqueeze(-1), x, axis)[0]
        passed = [x, out] if slope is None else [x, out, slope]
        if slope is not None and axis is None:
            done = fused.bell(x, t, sharpness, step, zero, hard, out, slope)
            if done:
                passed = [v.reshape(-1)[done:] for v in _in_memory_order(*passed)]
        for xs, ys, *ss in _blocks(*passed, axis=axis):
            wide = xs.float()
            if keep_slope or not hard:
                value, below, bells = (torch.zeros_like(wide) for _ in range(3))
                for _, s, sharp in _sigmoids(wide, t, sharpness, axis, below):
                    value.add_(s)
                    if keep_slope:
                        _add_bell(bells, s, sharp)
                if keep_slope:
                    ss[0].copy_(bells.mul_(one_step))
            if hard:
                _values(_count(wide, t, axis), wide, one_step, zero, ys)
            else:
                ys.copy_(value.add_(below).sub_(zero).mul_(one_step))
        ctx.save_for_backward(slope, x.clone() if needs_t else None,
                              # a copy: callers may overwrite what they got
                              out.clone() if ctx.needs_input_grad[2] else None, t, step, widths)
        ctx.k, ctx.axis = k, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, x, out, t, step, widths = ctx.saved_tensors
        axis = ctx.axis
        needs_x, needs_t, needs_step, *_ = ctx.needs_input_grad
        layout = next(saved for saved in (slope, x, out) if saved is not None)
        grad = _like(grads[0], layout)
        grad_x = grad * slope if slope is not None else None
        grad_t = grad_step = None
        if needs_step:
            by_level = torch.zeros_like(step, dtype=torch.float64)
            for gs, ys in _blocks(grad, out, axis=axis):
                by_level += _sum_to(gs.float() * ys.float(), axis)
            grad_step = (by_level / step).to(step.dtype)
        if needs_t:
            grad_x = torch.empty_like(grad)
            sharpness, m = ctx.k / widths, t.shape[-1]
            one_step = _spread(step.unsqueeze(-1), x, axis)[0]
            shares = torch.zeros_like(t, dtype=torch.float64)
            for gs, xs, outs in _blocks(grad, x, grad_x, axis=axis):
                wide = xs.float()
                total, below = torch.zeros_like(wide), torch.empty_like(wide)
                steep = gs.float() * one_step
                for i, s, sharp in _sigmoids(wide, t, sharpness, axis, below):
                    bell = torch.addcmul(s, s, s, value=-1).mul_(sharp).mul_(steep)
                    if isinstance(i, int):
                        shares[..., i] -= _sum_to(bell, axis)
                    else:  # bells off either end are zero
                        shares -= torch.bincount(i.clamp_(0, m - 1), bell.reshape(-1), m)
                    total.add_(bell)
                outs.copy_(total)
            grad_t = shares.to(t.dtype)
        return (grad_x if needs_x else None, grad_t, grad_step, None, None, None, None, None)


def staircase(x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
              surrogate: Surrogate = Surrogate(), gate: tuple[float, float] | None = None,
              axis: int | None = None) -> Tensor:
    """Quantize x: ``step * (#{i: x > t_i} - zero)``.

    Args:
        x: any shape, floating point; computed in float32, returned in its own type and memory
            order.
        t: (m,) thresholds, ascending; (C, m) per channel.
        step: () or (C,), positive.
        width: () or (C,), the window where m is 1.
        zero: (), the level that is 0; 2 * zero is an integer.
        surrogate: the gradient; the forward bits do not depend on it.
        gate: (lo, hi) outside which the derivative of an absorbed f is 0 (mode ``parent``).
        axis: the channel dimension of x where thresholds are per channel.
    """
    if torch.compiler.is_compiling():
        edges, widths = windows(t, width)
        wide, rows = x.float(), None if axis is None else axis % x.dim()
        if surrogate.mode == "sigmoid":
            y = plain.belled(wide, t, step, widths, zero, surrogate.k, rows)
        else:
            y = plain.windowed(wide, t, step, edges, widths, zero, surrogate.mode, gate, rows)
        return y.to(x.dtype)
    if surrogate.mode == "sigmoid":
        return _apply(_Bell, x, t, step, width, zero, surrogate.k, True, axis)
    return _apply(_Windowed, x, t, step, width, zero, surrogate.mode, gate, axis)


def soft_staircase(x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor, k: float,
                   axis: int | None = None) -> Tensor:
    """Return the softened twin ``step * (sum_i sigma(k (x - t_i) / w_i) - zero)``.

    sigma is the logistic function; w_i is held constant; k grows from 2 (smooth) towards infinity
    (q itself). Arguments as in :func:`staircase`.
    """
    if torch.compiler.is_compiling():
        rows = None if axis is None else axis % x.dim()
        return plain.soft(x.float(), t, step, windows(t, width).widths, zero, k, rows).to(x.dtype)
    return _apply(_Bell, x, t, step, width, zero, k, False, axis)


def _apply(function: Any, x: Tensor, *args: Any) -> Tensor:
    *rest, axis = args
    result: Tensor = function.apply(x, *rest, None if axis is None else axis % x.dim())
    return result
