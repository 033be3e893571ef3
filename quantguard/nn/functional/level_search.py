"""Three ways to count the thresholds below each element.

One comparison with each (:func:`count_below`), a formula for equally spaced thresholds
(:func:`count_by_formula`), and a grid for many other thresholds (:class:`Cells`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .per_channel import spread
from .reference import count_by_search

# Up to so many bounds one comparison with each is faster than a search.
COMPARE_UP_TO = 31
# With more thresholds in one cell of a grid a binary search is faster.
_FULLEST = 6
_TINY = 1e-30


def count_below(x: Tensor, bounds: Tensor, axis: int | None) -> Tensor:
    """Return, for each element of the block x, how many of the ascending bounds are < x.

    The counts are float32: on a CPU comparisons that return floats are vectorised, and those that
    return booleans take several times as long.
    """
    if bounds.shape[-1] <= COMPARE_UP_TO:
        first, *rest = spread(bounds, x, axis)
        count = torch.gt(x, first, out=torch.empty_like(x))
        above = torch.empty_like(x)
        for bound in rest:
            count.add_(torch.gt(x, bound, out=above))
        return count
    return count_by_search(x, bounds, axis)


def count_by_formula(x: Tensor, step: Any, zero: float, m: int) -> Tensor:
    """Return how many of ``step * (i - 1/2 - zero)``, i = 1..m, are < x; NaN for NaN."""
    count = (x / step).add_(zero + 0.5).floor_().clamp_(0, m)  # exact, or off by one
    bound, found = count + (0.5 - zero), torch.empty_like(x)
    torch.gt(x, bound.mul_(step), out=found)
    torch.sub(count, 0.5 + zero, out=bound)
    count.add_(found).sub_(torch.le(x, bound.mul_(step), out=found))
    result: Tensor = count.clamp_(0, m)
    return result


class Cells(NamedTuple):
    """Grid over many thresholds, by which an element is compared only with those of its cell.

    Attributes:
        low, scale: element x is in cell ``floor((x - low) * scale)``, clamped.
        before: (cells,), the number of thresholds in the cells further left.
        t: the thresholds and one infinity.
        most: the number of thresholds in the fullest cell.
    """

    low: float
    scale: float
    before: Tensor
    t: Tensor
    most: int

    @classmethod
    def of(cls, t: Tensor) -> Cells | None:
        """Return the grid of thresholds (m,); None where they are too unevenly spaced."""
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
        """Return the cell of each element; NaN is in the first."""
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
