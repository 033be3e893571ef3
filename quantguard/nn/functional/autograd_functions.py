"""Autograd functions of the staircase: its passes over memory, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled_kernels as compiled
from . import eager_kernels as eager
from .memory_blocks import BLOCK, dense, remainder, without_denormals
from .surrogates import gap_windows, image_windows, slope_tables

# A sigmoid this far from its threshold is 0 or 1 in float32. The reach is the number of thresholds
# nearer than that; it has only these values, because a loop is compiled for each.
_SATURATED, _REACHES = 17.0, (2, 3, 4, 6, 11, 19)


class Windowed(torch.autograd.Function):
    """Staircase with a slope that is constant in each window: ``ramp``, ``ste``, ``parent``.

    Backward needs one code per element (its window and the side of the threshold; one byte up to
    7 bits) and, for ``parent`` where f is absorbed, a mask of f'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                mode: str, gate: tuple[float, float] | None, axis: int | None) -> Tensor:
        x = dense(x)
        out = torch.empty_like(x)
        tables = slope_tables(t, step, width, zero, mode)
        code = None
        if any(ctx.needs_input_grad):
            # Bounds are edge, threshold, edge, ...: code 2i - 1 is window i left of t_i, and 2i
            # right of it.
            code = torch.empty_like(x, dtype=_code_type(t.shape[-1]))
        if code is None or not compiled.encode(x, t, tables.edges, step, zero, axis,
                                               tables.computed, out, code):
            eager.encode(x, t, tables.edges, step, zero, axis, tables.computed, out, code)
        derivative = None
        if mode == "parent" and gate is not None and code is not None:
            derivative = (x > gate[0]) & (x < gate[1])
        ctx.save_for_backward(code, derivative, step, tables.slopes, tables.table)
        ctx.zero, ctx.axis = zero, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        code, derivative, step, slopes, table = ctx.saved_tensors
        axis = ctx.axis
        needs_x, needs_t, needs_step, *_ = ctx.needs_input_grad
        grad = _like(grads[0], code)
        rows: Any = {"dtype": torch.float64, "device": step.device}
        grad_x = torch.empty_like(grad) if needs_x else None
        by_window = torch.zeros(*slopes.shape, **rows) if needs_t else None
        by_level = torch.zeros(step.shape, **rows) if needs_step else None
        if derivative is not None or not compiled.decode(grad, code, table, ctx.zero, axis, grad_x,
                                                         by_window, by_level):
            eager.decode(grad, code, derivative, table, ctx.zero, axis, grad_x, by_window,
                         by_level)
        return (grad_x,
                None if by_window is None else (-by_window * slopes).to(slopes.dtype),
                None if by_level is None else by_level.to(step.dtype),
                None, None, None, None, None)


class Bell(torch.autograd.Function):
    """Staircase (hard) or its softened form, both with the gradient of the softened form.

    ``dq/dx = sum_i step k/w_i s_i (1 - s_i)``, s_i = sigma(k (x - t_i) / w_i), sigma logistic.
    Where x alone needs a gradient the slope is saved. Thresholds need each bell s_i (1 - s_i)
    separately; x is saved for them instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                k: float, hard: bool, axis: int | None) -> Tensor:
        x = dense(x)
        out = torch.empty_like(x)
        tables = slope_tables(t, step, width, zero, "ramp")
        widths = tables.widths
        needs_x, needs_t, needs_step, *_ = ctx.needs_input_grad
        learned = needs_t or needs_step
        slope = torch.empty_like(x) if needs_x and not learned else None
        sharpness = k / widths
        reach = None
        if not learned and axis is None and tables.computed:
            reach = next((r for r in _REACHES if r >= _SATURATED / k + 2), None)
        done = 0 if axis is not None else compiled.bell(x, t, sharpness, step, zero, hard, reach,
                                                        out, slope)
        rest = [*remainder(done, x, out),
                *([None] if slope is None else remainder(done, slope))]
        eager.bell(rest[0], t, sharpness, step, zero, hard, axis, reach, *rest[1:])
        # A copy of x: callers may overwrite x.
        ctx.save_for_backward(slope, x.clone() if learned else None, t, step, widths)
        ctx.zero, ctx.k, ctx.hard, ctx.axis = zero, k, hard, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, x, t, step, widths = ctx.saved_tensors
        if slope is not None:
            return (without_denormals(_like(grads[0], slope) * slope), *[None] * 7)
        grad, axis, sharpness = _like(grads[0], x), ctx.axis, ctx.k / widths
        grad_x = torch.empty_like(grad)
        shares, by_level = (torch.zeros_like(v, dtype=torch.float64) for v in (t, step))
        done = 0 if axis is not None else compiled.bell_gradients(
            grad, x, t, sharpness, step, ctx.zero, ctx.hard, grad_x, shares, by_level)
        grads_left, xs, outs = remainder(done, grad, x, grad_x)
        eager.bell_gradients(grads_left, xs, t, sharpness, step, ctx.zero, ctx.hard, axis, outs,
                             shares, by_level)
        # Autograd drops the gradients that are not needed.
        return (without_denormals(grad_x), shares.to(t.dtype), by_level.to(step.dtype),
                *[None] * 5)


class Jumps(torch.autograd.Function):
    """Sum of sigmoids of any height, and its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, jumps: Tensor, base: Tensor, width: Tensor,
                k: float, by_image: bool, axis: int | None) -> Tensor:
        x = dense(x)
        out, slope = torch.empty_like(x), torch.empty_like(x)
        widths = image_windows(x, t, axis, width) if by_image else gap_windows(x, t, axis, width)
        rows = max(1, BLOCK * len(x) // max(x.numel(), 1))

        def spread(values: Tensor) -> Tensor:
            shape = [1] * x.dim()
            if axis is not None:
                shape[axis] = -1
            return values.reshape(shape)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            wide, steep = x[part].float(), torch.zeros_like(x[part], dtype=torch.float32)
            value = torch.zeros_like(steep).add_(spread(base))
            for i, window in enumerate(widths):
                sharp, jump = k / window[part], spread(jumps[..., i])
                s = torch.sub(wide, spread(t[..., i])).mul_(sharp).clamp_(max=eager.FAR)
                s.sigmoid_()
                value.add_(s * jump)
                steep.add_((1 - s).mul_(s).mul_(sharp).mul_(jump))
            out[part], slope[part] = value, steep
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (without_denormals(_like(grads[0], slope) * slope), *[None] * 7)


def _like(x: Tensor, layout: Tensor) -> Tensor:
    """Return x in the memory order of layout."""
    if x.stride() == layout.stride():
        return x
    return torch.empty_strided(layout.shape, layout.stride(), dtype=x.dtype,
                               device=x.device).copy_(x)


def _code_type(m: int) -> torch.dtype:
    # At 8 bits codes go up to 510. float16 represents them and is vectorised; int16 is not.
    return torch.uint8 if 2 * m + 2 <= 256 else torch.float16
