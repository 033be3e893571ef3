"""NES: the margin's gradient from differences along random directions, by queries alone.

Ilyas, Engstrom, Athalye, Lin 2018, arXiv:1804.08598, algorithm 1 (antithetic sampling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SpecError
from .losses import ascend
from .noise import seed_of
from .zoo import Ask, Differences, Guide


class NES(Differences):
    """Average differences along Gaussian directions and their opposites; step up, project.

    What is climbed is the margin, in place of the paper's target probability; steps are signs in
    Linf and have a length in L2. As with :class:`quantguard.attacks.zoo.ZOO`, differences over
    the usual ``h = 1e-4`` are exactly 0 on a staircase unless a threshold lies between: run
    ``rel_h`` 0.25, 0.5 and 1 as well, and take the worst.

    Args:
        norm: ``linf`` or ``l2``.
        steps: of ``2 * samples + 1`` queries each.
        samples: directions in a step, two queries each.
        h: the paper's sigma, a direction's standard deviation in each pixel, in pixel units,
            clipped to the bounds; None: 1e-4, unless rel_h is given.
        rel_h: in place of h: sigma over eps in Linf; in L2 a direction's length over eps, which
            is sigma times the root of how many numbers an image has.
        rate: first step's length over eps; steps shrink linearly to 0.
        momentum: what is kept of the last estimates, 0 to below 1.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer of large images.
        seed: of the directions, which belong to the image.

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

    def _guide(self, x0: Tensor, ask: Ask, eps: float, bounds: tuple[float, float]) -> Guide:
        size = x0[0].numel()
        sigma = self._reach(eps, 1 / math.sqrt(size) if self.norm == "l2" else 1.0)
        pairs = max(1, self._most(x0) // 2)
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} nes"))
                      for image in x0]
        mean = torch.zeros(len(x0), size, dtype=x0.dtype, device=x0.device)

        def guide(rows: Tensor, x: Tensor, step: int) -> Tensor:
            own = torch.arange(len(rows), device=x.device).repeat_interleave(self.samples)
            total = torch.zeros_like(x)
            for image in torch.split(own, pairs):
                # one draw a direction: how pairs are cut up must not matter
                unit = torch.stack([torch.randn(size, generator=generators[i])
                                    for i in rows[image].tolist()]).to(x)
                up, down = ((x[image] + side * sigma * unit).clamp(*bounds) for side in (1, -1))
                upper, lower = ask(torch.cat([up, down]), rows[image].repeat(2)).chunk(2)
                total.index_add_(0, image, (upper - lower).unsqueeze(1) * unit)
            mean[rows] = self.momentum * mean[rows] + (1 - self.momentum) * total
            return ascend(mean[rows], self.norm)

        return guide
