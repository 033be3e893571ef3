"""Square: random search with square-shaped changes, by queries alone.

Andriushchenko, Croce, Flammarion, Hein 2020, arXiv:1912.00049, algorithm 1 and 2 (Linf).
"""

from __future__ import annotations

import math
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..errors import SpecError
from ._foolbox import fb
from .bridge import labels_of, module_of
from .noise import seed_of
from .pgd import margin

# Section 4: the share of pixels changed at a time starts at p and is halved at these iterations of
# 10,000; a shorter search scales them.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(fb.attacks.base.FixedEpsilonAttack):
    """Change one random square at a time to a corner of the Linf ball; keep what raises the margin.

    Each image has its own random numbers, so that its result does not depend on its batch.

    Args:
        steps: squares tried, each one query; the stripes it starts from are the first.
        p: share of pixels changed at the start.
        seed: of the squares.

    Raises:
        SpecError: numbers out of range.
    """

    def __init__(self, steps: int = 1000, p: float = 0.8, seed: int = 0) -> None:
        if steps < 2 or not 0 < p <= 1:
            raise SpecError(f"steps={steps} must be at least 2, and p={p} in (0, 1]")
        self.steps, self.p, self.seed = steps, p, seed

    @property
    def distance(self) -> Any:
        return fb.distances.linf

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first point that fools model, else the strongest."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        x: Tensor = wrapped.raw
        found = self._search(model, x, labels_of(criterion), epsilon)
        return restore(ep.astensor(found))

    @torch.no_grad()
    def _search(self, model: Any, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        module, (low, high) = module_of(model), model.bounds
        # (N, C, H, W): features are an image one pixel high
        shape = x.shape if x.dim() == 4 else (len(x), 1, 1, x[0].numel())
        _, channels, height, width = shape
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} square"))
                      for image in x]
        least, most = (x - eps).clamp(low, high), (x + eps).clamp(low, high)

        def drawn(*size: int) -> Tensor:
            """Return uniform numbers, the first dimension an image's own."""
            return torch.stack([torch.rand(size, generator=g) for g in generators]).to(x.device)

        # Stripes, one pixel wide: images are known to be sensitive to them.
        signs = torch.where(drawn(channels, 1, width) < 0.5, -1.0, 1.0)
        best = torch.where(signs.expand(shape).reshape(x.shape) > 0, most, least)
        highest = margin(module(best), labels)
        for step in range(1, self.steps):
            standing = highest <= 0
            if not bool(standing.any()):
                break
            share = self.p / 2 ** sum(step > h * self.steps / 10_000 for h in _HALVINGS)
            side = max(1, round(math.sqrt(share * height * width)))
            rows = min(side, height)
            columns = min(max(1, round(share * height * width / rows)), width)
            where = drawn(2 + channels)
            top = (where[:, 0] * (height - rows + 1)).long().clamp(max=height - rows)
            left = (where[:, 1] * (width - columns + 1)).long().clamp(max=width - columns)
            down = torch.arange(height, device=x.device) - top.unsqueeze(1)
            across = torch.arange(width, device=x.device) - left.unsqueeze(1)
            inside = ((down >= 0) & (down < rows)).unsqueeze(2) & \
                ((across >= 0) & (across < columns)).unsqueeze(1)
            up = (where[:, 2:] < 0.5).reshape(-1, channels, 1, 1).expand(shape).reshape(x.shape)
            square = inside.unsqueeze(1).expand(shape).reshape(x.shape)
            trial = torch.where(square, torch.where(up, most, least), best)
            value = margin(module(trial), labels)
            better = standing & (value > highest)
            best[better], highest[better] = trial[better], value[better]
        return best
