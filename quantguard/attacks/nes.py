"""NES: gradient of the margin estimated from differences along random directions.

Ilyas, Engstrom, Athalye, Lin 2018, arXiv:1804.08598, algorithm 1 (antithetic sampling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import SpecError
from .finite_difference import Direction, FiniteDifferenceAttack, MarginQuery
from .losses import ascend
from .noise import seed_of


class NES(FiniteDifferenceAttack):
    """Projected ascent along averaged differences in Gaussian directions and their opposites.

    It maximises the margin instead of the paper's target probability. Steps are signs in Linf and
    normalised in L2. As with :class:`quantguard.attacks.zoo.ZOO`, differences over the usual
    ``h = 1e-4`` are exactly 0 on a quantized model unless a threshold lies between the two
    queries: run ``rel_h`` 0.25, 0.5 and 1 as well, and take the worst result.

    Args:
        norm: ``linf`` or ``l2``.
        steps: of ``2 * samples + 1`` queries each.
        samples: directions in a step, two queries each.
        h: the paper's sigma, a direction's standard deviation in each pixel, in pixel units,
            clipped to the bounds; None: 1e-4, unless rel_h is set.
        rel_h: instead of h: sigma over eps in Linf; in L2 a direction's length over eps, which is
            sigma times the square root of the number of values in an image.
        rate: first step's length over eps; steps shrink linearly to 0.
        momentum: weight of earlier estimates, 0 to below 1.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer for large images.
        seed: of the directions, which also depend on the image.

    Raises:
        SpecError: an unknown norm, numbers out of range, or both h and rel_h.
    """

    def __init__(self, norm: str = "linf", steps: int = 100, *, samples: int = 50,
                 h: float | None = None, rel_h: float | None = None, rate: float = 0.1,
                 momentum: float = 0.9, batch: int | None = None, seed: int = 0) -> None:
        super().__init__(norm, steps, samples, h, rel_h, rate, batch, seed)
        if not 0 <= momentum < 1:
            raise SpecError(f"momentum={momentum} must be from 0 to below 1")
        self.samples, self.momentum = samples, momentum

    def _direction(self, x0: Tensor, query: MarginQuery, eps: float,
                   bounds: tuple[float, float]) -> Direction:
        size = x0[0].numel()
        sigma = self._reach(eps, 1 / math.sqrt(size) if self.norm == "l2" else 1.0)
        pairs = max(1, self._queries_at_once(x0) // 2)
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} nes"))
                      for image in x0]
        mean = torch.zeros(len(x0), size, dtype=x0.dtype, device=x0.device)

        def direction(rows: Tensor, x: Tensor, step: int) -> Tensor:
            owner = torch.arange(len(rows), device=x.device).repeat_interleave(self.samples)
            total = torch.zeros_like(x)
            for image in torch.split(owner, pairs):
                # one draw for each direction, so that chunks do not change the numbers
                unit = torch.stack([torch.randn(size, generator=generators[i])
                                    for i in rows[image].tolist()]).to(x)
                up, down = ((x[image] + side * sigma * unit).clamp(*bounds) for side in (1, -1))
                upper, lower = query(torch.cat([up, down]), rows[image].repeat(2)).chunk(2)
                total.index_add_(0, image, (upper - lower).unsqueeze(1) * unit)
            mean[rows] = self.momentum * mean[rows] + (1 - self.momentum) * total
            return ascend(mean[rows], self.norm)

        return direction
