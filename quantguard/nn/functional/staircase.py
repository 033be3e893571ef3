"""The staircase function with its surrogate gradients, and its softened form.

``q(x) = step * (sum_i 1[x > t_i] - zero)``, i = 1..m, t ascending (Rakin, Yi, Gong, Fan 2018,
arXiv:1807.06714). All functions here are pure functions of tensors.

Ties go down (``x == t_i`` is not above t_i), +-inf get the outer levels, NaN stays NaN.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference as plain
from .autograd_functions import Bell, Jumps, Windowed
from .reference import recording, unrecorded
from .surrogates import windows

# With more thresholds they lie so close that windows of each image's own do not help.
MOST_SOFTENED = 15
MODES = ("ramp", "ste", "sigmoid", "parent")


class Surrogate(NamedTuple):
    """Surrogate gradient of a staircase: a mode, and the sharpness k of ``sigmoid``, no unit."""

    mode: str = "ramp"
    k: float = 8.0


def staircase(x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor,
              surrogate: Surrogate = Surrogate(), gate: tuple[float, float] | None = None,
              axis: int | None = None) -> Tensor:
    """Return x quantized: ``step * (#{i: x > t_i} - zero)``.

    Args:
        x: any shape, floating point. The result is computed in float32 and has the type and
            memory order of x.
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
    if needs_plain_operations():
        edges, widths = windows(t, width)
        wide, rows = x.float(), None if axis is None else axis % x.dim()
        if surrogate.mode == "sigmoid":
            y = plain.belled(wide, t, step, widths, zero, surrogate.k, rows)
        else:
            y = plain.windowed(wide, t, step, edges, widths, zero, surrogate.mode, gate, rows)
        return y.to(x.dtype)
    if surrogate.mode == "sigmoid":
        return _apply(Bell, x, t, step, width, zero, surrogate.k, True, axis)
    return _apply(Windowed, x, t, step, width, zero, surrogate.mode, gate, axis)


def soft_quantizer(x: Tensor, t: Tensor, step: Tensor, width: Tensor, zero: Tensor, k: float,
                   axis: int | None = None) -> Tensor:
    """Return the softened staircase ``step * (sum_i sigma(k (x - t_i) / w_i) - zero)``.

    sigma is the logistic function, and w_i has no gradient. k = 2 is smooth; the limit of large k
    is the staircase. The other arguments are those of :func:`staircase`.
    """
    if needs_plain_operations() or recording():
        rows = None if axis is None else axis % x.dim()
        with unrecorded():
            widths = windows(t, width).widths
        return plain.soft(x.float(), t, step, widths, zero, k, rows).to(x.dtype)
    return _apply(Bell, x, t, step, width, zero, k, False, axis)


def soft_jumps(x: Tensor, t: Tensor, jumps: Tensor, base: Tensor, width: Tensor, k: float,
               axis: int | None = None, by_image: bool = False) -> Tensor:
    """Return ``base + sum_i jumps_i sigma(k (x - t_i) / w_i)``; thresholds get no gradient.

    w_i are those of :func:`windows`, or each image's own (:func:`image_windows`). Attacks need
    both. On a trained 2-bit net (Fashion-MNIST) 146 of 215 images survive six attacks with the
    images' own windows, and 150 with the others. On a converted one (digits) 318 and 300 of 500
    survive a suite.

    Args:
        x: (N, ...).
        t: (m,) thresholds, ascending; (C, m) per channel.
        jumps: of the same shape, of either sign.
        base: () or (C,), the value below all thresholds.
        width: () or (C,), the window where m is 1; with by_image only for images of few numbers.
        k: sharpness, positive and dimensionless.
        axis: the channel dimension of x where thresholds are per channel.
    """
    return _apply(Jumps, x, t, jumps, base, width, k, by_image, axis)


def without_function_modes(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that hides operations on x from torch function modes.

    Such modes are for the calls of a model. A subclass of Tensor keeps its own functions.
    """
    if needs_plain_operations() or type(x) not in (Tensor, nn.Parameter):
        return nullcontext()
    return torch._C.DisableTorchFunction()


def needs_plain_operations() -> bool:
    """Return whether only plain operations work: under torch.compile and torch.func."""
    return torch.compiler.is_compiling() or \
        torch._C._functorch.peek_interpreter_stack() is not None


def _apply(function: Any, x: Tensor, *args: Any) -> Tensor:
    *rest, axis = args
    result: Tensor = function.apply(x, *rest, None if axis is None else axis % x.dim())
    return result
