"""Intervals in training, as centers and radii, and the training rules that many operations share.

They compute in real numbers: nothing is added for rounding. A training rule takes the operation
itself, and its arguments with intervals in place of tensors. Rules of single operations are in the
files of their families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class TrainInterval:
    """Interval of every element of a tensor, ``center - radius`` to ``center + radius``.

    Attributes:
        center, radius: (N, ...).
        last: weight and input of the linear layer that made it, if one did.
    """

    center: Tensor
    radius: Tensor
    last: tuple[Tensor, TrainInterval] | None = None

    @property
    def lower(self) -> Tensor:
        """Return the lower ends."""
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        """Return the upper ends."""
        return self.center + self.radius


def between(lower: Tensor, upper: Tensor) -> TrainInterval:
    """Return the interval with these ends."""
    return TrainInterval((lower + upper) / 2, (upper - lower) / 2)


def part(name: str, values: Any) -> Any:
    """Return values with that attribute in place of every interval."""
    return fx.node.map_aggregate(
        values, lambda v: getattr(v, name) if isinstance(v, TrainInterval) else v)


def _joined(make: Callable[[Tensor, Tensor], TrainInterval], first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return make(first, second)
    return tuple(make(a, b) for a, b in zip(first, second, strict=True))


def nonnegative_linear(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply the operation to center and radius: it is linear, and no weight is negative."""
    return _joined(TrainInterval, call(*part("center", args), **part("center", kwargs)),
                   call(*part("radius", args), **part("radius", kwargs)))


def nondecreasing(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply the operation to both ends: it is nondecreasing in every input."""
    return _joined(between, call(*part("lower", args), **part("lower", kwargs)),
                   call(*part("upper", args), **part("upper", kwargs)))


def unchanged(_call: Any, x: TrainInterval, *_args: Any, **_kwargs: Any) -> TrainInterval:
    """Return x: the operation is the identity."""
    return x
