"""Intervals: for each element of a tensor, two numbers that enclose the running model's value.

The value is the float32 number that the model computes, not the real number it approximates. The
model's own rounding is added to the bounds operation by operation (Higham 2002, Accuracy and
Stability of Numerical Algorithms, section 3.1): a sum of n products of float32 numbers, in any
order, fused or not, is off by at most ``gamma_n`` times the sum of their absolute values,
``gamma_n = n u / (1 - n u)``, ``u = 2^-24``. Bounds are computed in float64, whose rounding is
2^-29 of that and is covered by a few more terms. Intervals alone are computed in float32 on a CPU,
where that is twice as fast; then every sum is charged twice, for the model and for the bound.

Not covered are algorithms that do not sum products: FFT and Winograd convolutions (their error is a
small multiple of a sum's typical error, far below the worst case gamma_n, but nobody proves it).
Neither is anything below float32: TF32, bfloat16, autocast.

NaN means that nothing is known. It comes from overflow and passes through every operation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# The unit of rounding of float32.
U = 2.0**-24
# Products below float32's smallest normal number, 1.2e-38, may be flushed to zero: each is off by
# at most this, and so is each factor.
FLUSHED = 2e-38
# Beyond this a partial sum may have overflowed; float32 ends at 3.4e38.
LARGEST = 1e38

_numbers = itertools.count()


def gamma(n: int) -> float:
    """Return the error of a sum of n rounded terms, relative to the sum of absolute values."""
    return n * U / (1 - n * U)


def roundings(dtype: torch.dtype, terms: int) -> int:
    """Return how many roundings a bound of a sum is charged with for its own; none in float64.

    In float32 it is a sum of as many terms as the model's, a bias, and the interval's ends.
    """
    return 0 if dtype == torch.float64 else terms + 16


@dataclass(frozen=True, eq=False)
class Ball:
    """An L2 ball after elementwise operations: center + scale * d, |d|_2 <= radius.

    Attributes:
        center: (N, ...), float64.
        scale: (1, ...), 0 or more.
        error: (N, ...) or (1, ...), how far values may lie outside because of rounding.
        radius: in pixels.
    """

    center: Tensor
    scale: Tensor
    error: Tensor
    radius: float


class Step(Protocol):
    """The operation that made an interval, and how linear bounds go back through it."""

    inputs: tuple[Interval, ...]
    affine: bool

    def back(self, a: Tensor) -> tuple[list[Tensor], Tensor]:
        """Bound ``a . y`` from below by ``sum_i a_i . x_i + constant``.

        Args:
            a: (N, K, ...), K rows of coefficients of the output y.

        Returns:
            a_i (N, K, ...) for each input, and the constant (N, K).
        """


@dataclass(eq=False)
class Interval:
    """Bounds of one tensor of the graph.

    Attributes:
        lower, upper: (N, ...), float64 or float32, ``lower <= value <= upper``.
        step: the operation that made it; None for the input, and where it is not needed.
        ball: the L2 ball in which the values lie, where there is one.
        number: later intervals have larger numbers.
    """

    lower: Tensor
    upper: Tensor
    step: Step | None = None
    ball: Ball | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the tensor, images first."""
        return self.lower.shape

    @property
    def size(self) -> Tensor:
        """Return the largest absolute value of each element."""
        return torch.maximum(self.lower.abs(), self.upper.abs())


def narrowed(x: Tensor, up: bool) -> Tensor:
    """Return the nearest float32 number that is at least x (up) or at most x.

    A float32 number that is at least x is also at least the smallest one that is.
    """
    near = x.float()
    end = torch.full_like(near, torch.inf if up else -torch.inf)
    wrong = near.double() < x if up else near.double() > x
    return torch.where(wrong, torch.nextafter(near, end), near)
