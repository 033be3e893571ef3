"""The staircase function: its forward, its surrogate gradients, its softened twin.

``q(x) = step * (sum_i 1[x > t_i] - zero)``, i = 1..m, t ascending (Rakin, Yi, Gong, Fan 2018,
arXiv:1807.06714). All functions here are pure: tensors in, tensors out.

Ties go down (``x == t_i`` is not above t_i), +-inf take the outer levels, NaN stays NaN.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import blockwise, fused, plain
from .plain import recording, unrecorded
from .windows import gap_windows, image_windows, placed, windows

# A sigmoid this far from its threshold is 0 or 1 to float32; how many thresholds of equal steps may
# lie nearer, at the sharpnesses of attacks: few numbers, since a loop is compiled for each.
_SATURATED, _REACHES = 17.0, (2, 3, 4, 6, 11, 19)
# More thresholds lie so near each other that a window of an image's own says nothing.
MOST_SOFTENED = 15
MODES = ("ramp", "ste", "sigmoid", "parent")


class Surrogate(NamedTuple):
    """Name the gradient of a staircase: mode, and the dimensionless sharpness k of ``sigmoid``."""

    mode: str = "ramp"
    k: float = 8.0


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
    if recording():
        rows = None if axis is None else axis % x.dim()
        return plain.recorded(x.float(), t, step, zero, rows).to(x.dtype)
    if spelled_out():
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
    if spelled_out() or recording():
        rows = None if axis is None else axis % x.dim()
        with unrecorded():
            widths = windows(t, width).widths
        return plain.soft(x.float(), t, step, widths, zero, k, rows).to(x.dtype)
    return _apply(_Bell, x, t, step, width, zero, k, False, axis)


def soft_jumps(x: Tensor, t: Tensor, jumps: Tensor, base: Tensor, width: Tensor, k: float,
               axis: int | None = None, by_image: bool = False) -> Tensor:
    """Return ``base + sum_i jumps_i sigma(k (x - t_i) / w_i)``; thresholds get no gradient.

    w_i are those of :func:`windows`, or each image's own (:func:`image_windows`). Attacks need
    both: of 215 images of Fashion-MNIST on a trained 2-bit net six attacks leave 146 by the
    images' windows and 150 by the others, of 500 digits on a converted one a suite 318 and 300.

    Args:
        x: (N, ...).
        t: (m,) thresholds, ascending; (C, m) per channel.
        jumps: of the same shape, of either sign.
        base: () or (C,), the value below all thresholds.
        width: () or (C,), of single thresholds; by_image where an image has few numbers.
        k: sharpness, positive and dimensionless.
        axis: the channel dimension of x where thresholds are per channel.
    """
    return _apply(_Jumps, x, t, jumps, base, width, k, by_image, axis)


def unwatched(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that hides what is done to x from modes: they watch a model's calls.

    A subclass of Tensor keeps its own functions.
    """
    if spelled_out() or type(x) not in (Tensor, nn.Parameter):
        return nullcontext()
    return torch._C.DisableTorchFunction()


def spelled_out() -> bool:
    """Return whether plain operations are needed: torch.compile reads, torch.func maps them."""
    return torch.compiler.is_compiling() or \
        torch._C._functorch.peek_interpreter_stack() is not None


def _apply(function: Any, x: Tensor, *args: Any) -> Tensor:
    *rest, axis = args
    result: Tensor = function.apply(x, *rest, None if axis is None else axis % x.dim())
    return result


class _Windowed(torch.autograd.Function):
    """The staircase with a slope that is constant inside a window: ``ramp``, ``ste``, ``parent``.

    Backward needs one code an element (window and side; a byte up to 7 bits) and, for ``parent``
    where f is absorbed, a mask of f'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                mode: str, gate: tuple[float, float] | None, axis: int | None) -> Tensor:
        x = blockwise.dense(x)
        out = torch.empty_like(x)
        around = placed(t, step, width, zero, mode)
        code = None
        if any(ctx.needs_input_grad):
            # edge, threshold, edge, ...: code 2i - 1 is window i left of t_i, 2i right of it.
            code = torch.empty_like(x, dtype=_code_type(t.shape[-1]))
        if code is None or not fused.encode(x, t, around.edges, step, zero, axis, around.computed,
                                            out, code):
            blockwise.encode(x, t, around.edges, step, zero, axis, around.computed, out, code)
        derivative = None
        if mode == "parent" and gate is not None and code is not None:
            derivative = (x > gate[0]) & (x < gate[1])
        ctx.save_for_backward(code, derivative, step, around.slopes, around.table)
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
        if derivative is not None or not fused.decode(grad, code, table, ctx.zero, axis, grad_x,
                                                      by_window, by_level):
            blockwise.decode(grad, code, derivative, table, ctx.zero, axis, grad_x, by_window,
                             by_level)
        return (grad_x,
                None if by_window is None else (-by_window * slopes).to(slopes.dtype),
                None if by_level is None else by_level.to(step.dtype),
                None, None, None, None, None)


class _Bell(torch.autograd.Function):
    """The staircase (hard) or its softened twin, both with the twin's gradient.

    ``dq/dx = sum_i step k/w_i s_i (1 - s_i)``, s_i = sigma(k (x - t_i) / w_i), sigma logistic.
    For x alone the slope is kept; thresholds need every bell apart, so then x is kept instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
                k: float, hard: bool, axis: int | None) -> Tensor:
        x = blockwise.dense(x)
        out = torch.empty_like(x)
        around = placed(t, step, width, zero, "ramp")
        widths = around.widths
        needs_x, needs_t, needs_step, *_ = ctx.needs_input_grad
        learned = needs_t or needs_step
        slope = torch.empty_like(x) if needs_x and not learned else None
        sharpness = k / widths
        reach = None
        if not learned and axis is None and around.computed:
            reach = next((r for r in _REACHES if r >= _SATURATED / k + 2), None)
        done = 0 if axis is not None else fused.bell(x, t, sharpness, step, zero, hard, reach, out,
                                                     slope)
        rest = [*blockwise.left(done, x, out),
                *([None] if slope is None else blockwise.left(done, slope))]
        blockwise.bell(rest[0], t, sharpness, step, zero, hard, axis, reach, *rest[1:])
        # a copy: callers may overwrite what they gave
        ctx.save_for_backward(slope, x.clone() if learned else None, t, step, widths)
        ctx.zero, ctx.k, ctx.hard, ctx.axis = zero, k, hard, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, x, t, step, widths = ctx.saved_tensors
        if slope is not None:
            return (blockwise.without_denormals(_like(grads[0], slope) * slope), *[None] * 7)
        grad, axis, sharpness = _like(grads[0], x), ctx.axis, ctx.k / widths
        grad_x = torch.empty_like(grad)
        shares, by_level = (torch.zeros_like(v, dtype=torch.float64) for v in (t, step))
        done = 0 if axis is not None else fused.bell_gradients(
            grad, x, t, sharpness, step, ctx.zero, ctx.hard, grad_x, shares, by_level)
        left, xs, outs = blockwise.left(done, grad, x, grad_x)
        blockwise.bell_gradients(left, xs, t, sharpness, step, ctx.zero, ctx.hard, axis, outs,
                                 shares, by_level)
        # autograd leaves out what nobody asked for
        return (blockwise.without_denormals(grad_x), shares.to(t.dtype), by_level.to(step.dtype),
                *[None] * 5)


class _Jumps(torch.autograd.Function):
    """Sigmoids of any height, and their slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, jumps: Tensor, base: Tensor, width: Tensor,
                k: float, by_image: bool, axis: int | None) -> Tensor:
        x = blockwise.dense(x)
        out, slope = torch.empty_like(x), torch.empty_like(x)
        widths = image_windows(x, t, axis, width) if by_image else gap_windows(x, t, axis, width)
        rows = max(1, blockwise.BLOCK * len(x) // max(x.numel(), 1))

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
                s = torch.sub(wide, spread(t[..., i])).mul_(sharp).clamp_(max=blockwise.FAR)
                s.sigmoid_()
                value.add_(s * jump)
                steep.add_((1 - s).mul_(s).mul_(sharp).mul_(jump))
            out[part], slope[part] = value, steep
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (blockwise.without_denormals(_like(grads[0], slope) * slope), *[None] * 7)


def _like(x: Tensor, layout: Tensor) -> Tensor:
    """Return x in the memory order of layout."""
    if x.stride() == layout.stride():
        return x
    return torch.empty_strided(layout.shape, layout.stride(), dtype=x.dtype,
                               device=x.device).copy_(x)


def _code_type(m: int) -> torch.dtype:
    # At 8 bits codes are integers up to 510, which float16 holds; it is vectorised, int16 is not.
    return torch.uint8 if 2 * m + 2 <= 256 else torch.float16
