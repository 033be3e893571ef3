"""ZOO: Adam on finite differences along single coordinates.

Chen, Zhang, Sharma, Yi, Hsieh 2017, arXiv:1708.03999, algorithms 1 and 2. Instead of the search
over the constant of Carlini & Wagner, the margin is maximised within a ball of fixed radius.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .finite_difference import Direction, FiniteDifferenceAttack, MarginQuery
from .losses import ascend
from .noise import seed_of

# Decay of Adam's moments, as in algorithm 2.
_BETAS = (0.9, 0.999)


class ZOO(FiniteDifferenceAttack):
    """Ascent on the margin; each step estimates the slopes of some coordinates and moves all known.

    The loss is the difference of log-probabilities in eq. 5, which equals that of the logits: the
    margin. The hinge is omitted, since broken images are not attacked any further. Coordinates
    come in random order, each once before any is repeated. Apart from the ball there are two
    differences from the paper: a coordinate moves along its moment in every step, not only when
    its slope is estimated; and in L2 there is one second moment of Adam for each image (a step has
    a length), since one for each coordinate would lead to a corner of the cube.

    On a quantized model, differences over the usual ``h = 1e-4`` are exactly 0 unless a threshold
    lies between the two queries. The attack then finds nothing, which is no evidence of robustness:
    run ``rel_h`` 0.25, 0.5 and 1 as well, and take the worst result.

    Args:
        norm: ``l2`` or ``linf``.
        steps: of at most ``2 * coordinates + 1`` queries each.
        coordinates: slopes estimated in a step, two queries each.
        h: distance to either side of the point, in pixel units, clipped to the bounds; None: 1e-4,
            unless rel_h is set.
        rel_h: h over eps, instead of h.
        rate: first step's length over eps, in Linf that of each coordinate; steps shrink to 0.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer for large images.
        seed: of the order of coordinates, which also depends on the image.

    Raises:
        SpecError: an unknown norm, numbers out of range, or both h and rel_h.
    """

    def __init__(self, norm: str = "l2", steps: int = 40, *, coordinates: int = 128,
                 h: float | None = None, rel_h: float | None = None, rate: float = 0.5,
                 batch: int | None = None, seed: int = 0) -> None:
        super().__init__(norm, steps, coordinates, h, rel_h, rate, batch, seed)
        self.coordinates = coordinates

    def _direction(self, x0: Tensor, query: MarginQuery, eps: float,
                   bounds: tuple[float, float]) -> Direction:
        size, (low, high) = x0[0].numel(), bounds
        h = self._reach(eps)
        width, pairs = -(-size // self.coordinates), max(1, self._queries_at_once(x0) // 2)
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} zoo"))
                      for image in x0]
        order = torch.zeros(len(x0), size, dtype=torch.long, device=x0.device)
        first, second = torch.zeros(2, len(x0), size, dtype=x0.dtype, device=x0.device)

        def direction(rows: Tensor, x: Tensor, step: int) -> Tensor:
            sweep, chunk = divmod(step, width)
            if chunk == 0:
                order[rows] = torch.stack([torch.randperm(size, generator=generators[i])
                                           for i in rows.tolist()]).to(x.device)
            where = order[rows, chunk * self.coordinates:(chunk + 1) * self.coordinates]
            owner = torch.arange(len(rows), device=x.device).repeat_interleave(where.shape[1])
            slopes = []
            for image, place in zip(torch.split(owner, pairs), torch.split(where.flatten(), pairs),
                                    strict=True):
                here = x[image, place].unsqueeze(1)
                up, down = (here + h).clamp(max=high), (here - h).clamp(min=low)
                at = place.unsqueeze(1)
                points = torch.cat([x[image].scatter(1, at, moved) for moved in (up, down)])
                upper, lower = query(points, rows[image].repeat(2)).chunk(2)
                slopes.append((upper - lower) / (up - down).squeeze(1).clamp_min(1e-30))
            slope, seen = torch.cat(slopes).reshape(where.shape), (rows.unsqueeze(1), where)
            # bias-corrected moments: a coordinate has been seen sweep + 1 times
            for moment, beta, value in ((first, _BETAS[0], slope), (second, _BETAS[1], slope ** 2)):
                moment[seen] += (value - moment[seen]) * (1 - beta) / (1 - beta ** (sweep + 1))
            if self.norm == "l2":
                return ascend(first[rows], "l2")
            way: Tensor = first[rows] / second[rows].sqrt().clamp_min(1e-30)
            return way

        return direction
