"""Gradients for non-differentiable operations: straight-through estimators and window means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Number of points in its window at which a softened operation is evaluated.
_POINTS = 8
# Half of the window at k = 1, over the scale of x: it spreads as much as a logistic distribution.
_HALF_WINDOW = 3.0


class StraightThrough(torch.autograd.Function):
    """y, with the gradient of x, or for a sign that of ``tanh(2 x / mean |x|)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sign: bool) -> Tensor:
        ctx.sign = sign
        if sign:
            ctx.save_for_backward(x.clone())  # x may be written to
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.sign:
            return grads[0], None, None
        (x,) = ctx.saved_tensors
        rows = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
        scale = 2 / rows.abs().mean(1).clamp_min(1e-12).reshape(-1, *[1] * (x.dim() - 1))
        return grads[0] * scale * (1 - (x * scale).tanh().square()), None, None


class FunctionInput(torch.autograd.Function):
    """Input of a custom Function; images with a zero gradient get that of the output instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        ctx.shared = shared
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, of_output = grads[0], ctx.shared.pop("grad", None)
        if of_output is None or of_output.shape != grad.shape or grad.dim() == 0:
            return grad, None
        rows = grad.flatten(1) if grad.dim() > 1 else grad.reshape(-1, 1)
        zero = (rows == 0).all(1).reshape(-1, *[1] * (grad.dim() - 1))
        return torch.where(zero, of_output, grad), None


class FunctionOutput(torch.autograd.Function):
    """Output of a custom Function, whose gradient is stored for :class:`FunctionInput`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shared: dict[str, Tensor]) -> Tensor:
        ctx.shared = shared
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.shared["grad"] = grads[0]
        return grads[0], None


class _WindowMean(torch.autograd.Function):
    """Mean of f over a window of half-width h around x, with the mean's own slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        points = (torch.arange(_POINTS, device=x.device) + 0.5) * (2 / _POINTS) - 1
        ctx.save_for_backward((f(x + h) - f(x - h)) / (2 * h))
        return torch.stack([f(x + h * float(point)) for point in points]).mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None


def window_mean(x: Tensor, f: Callable[[Tensor], Tensor], k: float, scale: Tensor) -> Tensor:
    """Return f softened with sharpness k: its mean over a window around x.

    Args:
        x: input of f, an elementwise function.
        scale: of x, broadcast with it; the window is as wide as the scale demands at k = 1.
    """
    return _WindowMean.apply(x, f, _HALF_WINDOW / k * scale)  # type: ignore[no-any-return]


# This scale and that of a sign (step_functions.median_distance) were chosen on a LeNet and 128
# images, by the number of survivors of three or four attacks with k 2 to 128. Layers differ in
# their sparsity and mean; a scale that depends on these softens one layer more than the next.
def rms_size(x: Tensor) -> Tensor:
    """Return the root mean square of each image's nonzero values, (N, 1, ...), to scale rounding.

    With a ReLU in front 68 images survive; with the standard deviation of all values 75.
    """
    rows = _float_rows(x)
    size = (rows.square().sum(1) / (rows != 0).sum(1).clamp_min(1)).sqrt()
    return size.clamp_min(1e-6).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _float_rows(x: Tensor) -> Tensor:
    """Return x as (N, values of an image), in a type that can hold the sum of their squares."""
    rows = x.detach().flatten(1) if x.dim() > 1 else x.detach().reshape(-1, 1)
    return rows if rows.dtype == torch.float64 else rows.float()


def is_elementwise_and_flat(call: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Return whether a Function is elementwise, and its backward always zero."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = call(leaf)
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point() \
                or not y.requires_grad or not x.dim():
            return False
        (gradient,) = torch.autograd.grad(y.sum(), leaf, allow_unused=True)
    if gradient is not None and bool(gradient.any()):
        return False
    every_other = torch.arange(x.numel(), device=x.device).reshape(x.shape) % 2 == 0
    with torch.no_grad():
        moved = call(torch.where(every_other, x + rms_size(x), x))
    return bool((moved == y)[~every_other].all())
