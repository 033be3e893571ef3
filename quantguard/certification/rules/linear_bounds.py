"""Steps from intervals to intervals: affine maps, functions of one variable, maximum pooling.

Each step goes both ways: forward it computes bounds of its output (interval arithmetic), and
backward it turns a linear lower bound over its output into one over its inputs (CROWN: Zhang, Weng,
Chen, Hsieh, Daniel 2018, arXiv:1811.00866).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .intervals import FLUSHED, LARGEST, Ball, Interval, gamma, roundings

Map = Callable[..., Tensor]

# Roundings of an operation on two numbers: it rounds once, scalars are rounded to float32 first,
# and some kernels multiply by a rounded reciprocal.
FEW = 4
# Every slope is sound, because its intercept is a minimum over corners; steep ones lose digits.
_STEEPEST = 1e4
# With more corners than this, no lines from a corner to an end are tried.
_CORNERS = 8


class Affine:
    """The map ``y = linear(x_1, ...) + bias``.

    Args:
        inputs: one or more intervals.
        linear: acts on each image separately; linear in all inputs together.
        absolute: the same map with the absolute values of its weights.
        bias: broadcasts against y; None: 0.
        terms: roundings that one element of y takes; 0: none, values are only moved.
        weight_of_bias: what the bias's rounding is relative to; None: ``|bias|``.
        squares: the same map with the squares of its weights, if each element of y is a sum of
            different elements of x: an L2 ball passes through it.
        diagonal: whether each element of y comes from one element of x.
    """

    affine = True

    def __init__(self, inputs: tuple[Interval, ...], linear: Map, absolute: Map,
                 bias: Tensor | None = None, terms: int = 0, *,
                 weight_of_bias: Tensor | None = None, squares: Map | None = None,
                 diagonal: bool = False) -> None:
        self.inputs, self.linear, self.absolute, self.terms = inputs, linear, absolute, terms
        self.bias = bias
        self.weight_of_bias = bias.abs() if bias is not None and weight_of_bias is None \
            else weight_of_bias
        self.squares, self.diagonal = squares, diagonal

    def interval(self) -> Interval:
        """Return the bounds of y."""
        inputs = self.inputs
        if not self.terms:
            lower, upper = (self.linear(*side) for side in ([b.lower for b in inputs],
                                                            [b.upper for b in inputs]))
        else:
            centers = [(b.lower + b.upper).mul_(0.5) for b in inputs]
            middle = self._shifted(self.linear(*centers))
            # In float32 the middle rounds as in the model, and so do the ends of the interval;
            # the radius is a sum of as many terms, none of them negative.
            own = roundings(middle.dtype, self.terms)
            g, flushed = gamma(self.terms + own), FLUSHED * (4 if own else 1)
            # r + g (|c| + r), r the half of the width, in few passes over memory
            radius = self._off([(b.upper - b.lower).mul_((1 + g) / 2).add_(c.abs(), alpha=g)
                                .add_(flushed)
                                for b, c in zip(inputs, centers, strict=True)], g)
            if own:
                radius = radius.mul_(1 + 4 * gamma(own))
            lower, upper = middle - radius, middle + radius
        ball = inputs[0].ball if len(inputs) == 1 else None
        if ball is not None:
            lower, upper, ball = self._through(ball, lower, upper)
        return Interval(lower, upper, self, ball)

    def _shifted(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _off(self, parts: Sequence[Tensor], g: float) -> Tensor:
        """Return the error of y if its inputs are off by parts and its sums by a share g.

        NaN where a sum may have overflowed; parts are at least g times the inputs.
        """
        off = self.absolute(*parts) + 4 * self.terms * FLUSHED  # a new tensor for every map
        if self.weight_of_bias is not None:
            off = off.add_((g * self.weight_of_bias).to(off.dtype))
        return limited(off, g)

    def _through(self, ball: Ball, lower: Tensor,
                 upper: Tensor) -> tuple[Tensor, Tensor, Ball | None]:
        """Return the bounds narrowed by an L2 ball of inputs, and the ball of y if there is one."""
        if not (self.diagonal or self.squares):
            return lower, upper, None
        center = self._shifted(self.linear(ball.center))
        if self.terms:
            g = gamma(self.terms)
            size = ball.center.abs() + ball.radius * ball.scale + ball.error
            error = self._off([ball.error + g * (size + FLUSHED / g)], g)
        else:
            error = self.absolute(ball.error)
        if self.squares is None:
            return lower, upper, Ball(center, self.absolute(ball.scale), error, ball.radius)
        # |w . d| <= |w|_2 |d|_2
        reach = ball.radius * self.squares(ball.scale.square()).sqrt() * (1 + 1e-9) + error
        return torch.maximum(lower, center - reach), torch.minimum(upper, center + reach), None

    def back(self, a: Tensor) -> tuple[list[Tensor], Tensor]:
        """Go back through the transposed map, which autograd computes."""
        n, k = a.shape[:2]
        with torch.enable_grad():
            zeros = [torch.zeros(n * k, *b.shape[1:], dtype=a.dtype, device=a.device,
                                 requires_grad=True) for b in self.inputs]
            parts = torch.autograd.grad(self.linear(*zeros), zeros, a.reshape(n * k, *a.shape[2:]))
        constant = a.new_zeros(n, k)
        if self.bias is not None:
            constant = dot(a, self.bias.expand(a.shape[2:])[None])
        if self.terms:
            g = gamma(self.terms)
            # 1 % covers the float64 rounding of the transposed map, 2^-29 of this for each term.
            error = 1.01 * self._off([g * (b.size.double() + FLUSHED / g) for b in self.inputs], g)
            constant = constant - dot(a.abs(), error)
        return [p.reshape(n, k, *p.shape[1:]) for p in parts], constant


def moved(x: Interval, move: Callable[[Tensor], Tensor], injective: bool = True) -> Interval:
    """Return the interval of values that are only moved, within each image."""
    return Affine((x,), move, move, diagonal=injective).interval()


def averaged(x: Interval, pool: Callable[[Tensor], Tensor], terms: int) -> Interval:
    """Return the interval of sums or means of so many terms."""
    return Affine((x,), pool, pool, terms=terms + FEW).interval()


class Normed(Affine):
    """An affine map followed by a factor and a shift for each channel, as one map.

    Args:
        first: the map; nothing else reads its output.
        scale, shift: broadcast against y.
        size: what the shift's rounding is relative to.
        terms: roundings of the second part.
    """

    def __init__(self, first: Affine, scale: Tensor, shift: Tensor, size: Tensor,
                 terms: int) -> None:
        def linear(*parts: Tensor) -> Tensor:
            y = first.linear(*parts)
            return y * scale.to(y.dtype)

        def squares(v: Tensor) -> Tensor:
            assert first.squares is not None
            return first.squares(v) * scale.square().to(v.dtype)
        self.first, self.factor = first, scale.abs()
        if first.bias is not None and first.weight_of_bias is not None:
            shift = shift + first.bias * scale
            size = size + first.weight_of_bias * self.factor
        super().__init__(first.inputs, linear, first.absolute, shift, first.terms + terms,
                         weight_of_bias=size, squares=first.squares and squares)

    def _off(self, parts: Sequence[Tensor], g: float) -> Tensor:
        off = self.first._off(parts, g)
        off = off.mul_(self.factor.to(off.dtype)).add_(4 * self.terms * FLUSHED)
        assert self.weight_of_bias is not None
        return limited(off.add_((g * self.weight_of_bias).to(off.dtype)), g)


def limited(off: Tensor, g: float) -> Tensor:
    """Return a rounding error, NaN where it is so large that a sum may have overflowed."""
    if bool(off.amax() < g * LARGEST):
        return off
    return torch.where(off < g * LARGEST, off, torch.nan)


def dot(a: Tensor, x: Tensor) -> Tensor:
    """Return the sums over elements: a (N, K, ...), x (N or 1, ...) -> (N, K)."""
    rows = x.to(a.dtype).reshape(x.shape[0], -1, 1).expand(a.shape[0], -1, 1)
    result: Tensor = torch.bmm(a.flatten(2) if a.dim() > 2 else a.unsqueeze(2), rows).squeeze(2)
    return result


class PiecewiseLinear:
    """A function of one variable that is linear between corners; a jump has two corners.

    Args:
        x: its input.
        ends: the ends of the input's interval, lower and upper, (N, ...).
        values: the function's values there.
        corners: (place, value) pairs that broadcast against x; a value counts where its place lies
            inside the interval.
        error: (N, ...) or a number, the rounding error of the function.
    """

    affine = False

    def __init__(self, x: Interval, ends: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor],
                 corners: Sequence[tuple[Any, Any]], error: Any = 0.0) -> None:
        self.inputs: tuple[Interval, ...] = (x,)
        self.ends, self.values = ends, values
        self.corners, self.error = corners, error

    def back(self, a: Tensor) -> tuple[list[Tensor], Tensor]:
        """Take the lower line where the coefficient is positive, the upper one elsewhere."""
        low, low_at = lower_line(self.ends, self.values, self.corners)
        negated = [(place, -value) for place, value in self.corners]
        high, high_at = lower_line(self.ends, (-self.values[0], -self.values[1]), negated)
        up, down = a.clamp(min=0), a.clamp(max=0)
        constant = dot(up, low_at - self.error) + dot(down, self.error - high_at)
        return [up * low.unsqueeze(1) - down * high.unsqueeze(1)], constant


def lower_line(ends: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor],
               corners: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of a line below a function that is linear between corners.

    A line of any slope is below the function if it is below at the ends and at the corners. Of
    horizontal lines, chords, and lines from a corner to an end, this takes the highest one at the
    interval's middle: the area between line and function is smallest.

    Args:
        ends, values, corners: as in :class:`PiecewiseLinear`.
    """
    (left, right), (first, last) = ends, values
    inside = [(left <= place) & (place <= right) for place, _ in corners]
    slopes = [torch.zeros_like(left), _slope(right - left, last - first)]
    if len(corners) <= _CORNERS:
        for (place, value), here in zip(corners, inside, strict=True):
            slopes += [torch.where(here, _slope(place - left, value - first), 0.0),
                       torch.where(here, _slope(right - place, last - value), 0.0)]
    middle = (left + right) / 2
    best = torch.full_like(left, -torch.inf)
    slope, intercept = slopes[0], best
    for tried in slopes:
        at = torch.minimum(first - tried * left, last - tried * right)
        for (place, value), here in zip(corners, inside, strict=True):
            at = torch.minimum(at, torch.where(here, value - tried * place, torch.inf))
        better = tried * middle + at > best
        best = torch.where(better, tried * middle + at, best)
        slope, intercept = torch.where(better, tried, slope), torch.where(better, at, intercept)
    # If no line was better, a value is NaN, and nothing is known.
    return slope, torch.where(intercept.isinf(), torch.nan, intercept)


def _slope(run: Tensor, rise: Tensor) -> Tensor:
    slope = rise / run.clamp(min=1e-30)
    return torch.where(slope.abs() < _STEEPEST, slope, 0.0)


class MaxPool:
    """A maximum pooling: at least the element of its window with the largest lower bound."""

    affine = False

    def __init__(self, x: Interval, pool: Map, upper: Tensor) -> None:
        self.inputs: tuple[Interval, ...] = (x,)
        self.pool, self.upper = pool, upper

    def back(self, a: Tensor) -> tuple[list[Tensor], Tensor]:
        """Go back to that element for positive coefficients, and use a constant for others."""
        n, k = a.shape[:2]
        x = self.inputs[0].lower
        with torch.enable_grad():
            at = x.unsqueeze(1).expand(n, k, *x.shape[1:]).flatten(0, 1).requires_grad_()
            (part,) = torch.autograd.grad(self.pool(at), at, a.clamp(min=0).flatten(0, 1))
        return [part.reshape(n, k, *x.shape[1:])], dot(a.clamp(max=0), self.upper)
