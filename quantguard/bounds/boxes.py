"""Boxes: two numbers for each element of a tensor, between which the running model's value lies.

What is bounded is the float32 number that the model computes, not the real number it stands for.
What the model's own rounding can do is added to the bounds, operation by operation (Higham 2002,
Accuracy and Stability of Numerical Algorithms, section 3.1): a sum of n products of float32
numbers, in any order, fused or not, is off by at most ``gamma_n`` times the sum of their absolute
values, ``gamma_n = n u / (1 - n u)``, ``u = 2^-24``. Bounds are worked out in double, whose
rounding is 2^-29 of that and is covered by a few terms more; intervals alone in float32, on a CPU,
where they are twice as fast: then every sum is charged twice, for the model and for the bound.

Not covered are algorithms that do not sum products: FFT and Winograd convolutions (their error is
a small multiple of a sum's typical one, far below gamma_n, which is its worst; but nobody proves
it), and anything less than float32: TF32, bfloat16, autocast.

NaN is "nothing is known": it comes of overflow and passes through every operation to the end.
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
    """Return how much of the sum of absolute values a sum of n rounded terms may be off."""
    return n * U / (1 - n * U)


def roundings(dtype: torch.dtype, terms: int) -> int:
    """Return how many roundings more a bound of a sum is charged with for its own: none in double.

    A sum of as many terms as the model's, its bias, the middle of the interval and its ends.
    """
    return 0 if dtype == torch.float64 else terms + 16


@dataclass(frozen=True, eq=False)
class Ball:
    """Hold an L2 ball carried through elementwise operations: center + scale * d, |d|_2 <= radius.

    Attributes:
        center: (N, ...), float64.
        scale: (1, ...), 0 or more.
        error: (N, ...) or (1, ...), how far rounding may lead outside.
        radius: in pixels.
    """

    center: Tensor
    scale: Tensor
    error: Tensor
    radius: float


class Step(Protocol):
    """Name what made a box, and how linear bounds go back through it."""

    inputs: tuple[Box, ...]
    affine: bool

    def back(self, a: Tensor) -> tuple[list[Tensor], Tensor]:
        """Bound ``a . y`` from below by ``sum_i a_i . x_i + constant``.

        Args:
            a: (N, K, ...), K rows of coefficients of the output y.

        Returns:
            a_i (N, K, ...) for each input, and the constant (N, K).
        """


@dataclass(eq=False)
class Box:
    """Hold bounds of one tensor of the graph.

    Attributes:
        lower, upper: (N, ...), float64 or float32, ``lower <= value <= upper``.
        step: what made it; None for the input, and where nobody goes back any further.
        ball: the same values as an L2 ball, where they are one.
        number: later boxes have larger ones.
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
    """Return the float32 number next to x, above or equal for a lower bound (up), else below.

    A value that is a float32 number and is at least x is at least the one next above x.
    """
    near = x.float()
    end = torch.full_like(near, torch.inf if up else -torch.inf)
    wrong = near.double() < x if up else near.double() > x
    return torch.where(wrong, torch.nextafter(near, end), near)
