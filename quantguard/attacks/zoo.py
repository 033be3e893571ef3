"""ZOO: differences along single coordinates, climbed with ADAM; and climbing by queries alone.

Chen, Zhang, Sharma, Yi, Hsieh 2017, arXiv:1708.03999, algorithms 1 and 2; without its search over
the constant of Carlini & Wagner: the margin is climbed within a ball of fixed radius.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..errors import SpecError
from ._foolbox import InNorm, fb, known_norm
from .bridge import labels_of, module_of
from .losses import ascend, height, project
from .noise import seed_of

# Decay of ADAM's moments, as in algorithm 2.
_BETAS = (0.9, 0.999)
# The most numbers in one forward pass, and images: on a CPU more are slower, out of its cache.
_NUMBERS, _IMAGES, _IMAGES_ON_CPU = 2 ** 22, 4096, 64

# (points (K, F), image of each (K,)) -> their margins (K,): one query each
Ask = Callable[[Tensor, Tensor], Tensor]
# (images that stand (n,), their points (n, F), step) -> where to go from there (n, F)
Guide = Callable[[Tensor, Tensor, int], Tensor]


class Differences(InNorm, ABC):
    """Climb the margin in the eps ball along a direction that differences of queries point out.

    An image that fell costs no further queries. Queries stay within the bounds, but not in the
    ball; only points of the ball are kept.

    Args:
        norm: ``linf`` or ``l2``.
        steps: at most; an image takes one query to judge where each leads.
        differences: in a step, two queries each.
        h: how far they reach, in pixel units; None: 1e-4, unless rel_h is given.
        rel_h: h over eps, in place of h.
        rate: first step's length over eps; steps shrink linearly to 0.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer of large images.
        seed: of the random numbers, which belong to the image.

    Raises:
        SpecError: an unknown norm, numbers out of range, or both h and rel_h.
    """

    def __init__(self, norm: str, steps: int, differences: int, h: float | None,
                 rel_h: float | None, rate: float, batch: int | None, seed: int) -> None:
        known_norm(norm)
        if steps < 1 or differences < 1:
            raise SpecError(f"steps={steps} and the differences in a step, {differences}, must be "
                            "at least 1")
        if h is not None and rel_h is not None:
            raise SpecError(f"h={h} and rel_h={rel_h} exclude each other", fix="Give one of them.")
        h = 1e-4 if h is None and rel_h is None else h
        if not (h or rel_h or 0) > 0 or not rate > 0:
            raise SpecError(f"h={h}, or rel_h={rel_h} where given, and rate={rate} must be above 0")
        if batch is not None and batch < 2:
            raise SpecError(f"batch={batch} must be at least 2: a difference is two queries")
        self.norm, self.steps, self.h, self.rel_h, self.rate = norm, steps, h, rel_h, rate
        self.batch, self.seed = batch, seed

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first point that fools model, else the strongest."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        found = self._search(model, wrapped.raw, labels_of(criterion), epsilon)
        return restore(ep.astensor(found))

    @torch.no_grad()
    def _search(self, model: Any, x0: Tensor, labels: Tensor, eps: float) -> Tensor:
        module, most = module_of(model), self._most(x0)

        def ask(points: Tensor, owner: Tensor) -> Tensor:
            parts = zip(torch.split(points, most), torch.split(owner, most), strict=True)
            return torch.cat([height(module(p.reshape(-1, *x0.shape[1:])), labels[o])
                              for p, o in parts])

        x, kept = x0.clone(), x0.clone()
        highest = ask(x0, torch.arange(len(x0), device=x0.device))
        guide = self._guide(x0, ask, eps, model.bounds)
        for step in range(self.steps if eps > 0 else 0):
            rows = (highest <= 0).nonzero().squeeze(1)
            if not len(rows):
                break
            way = guide(rows, x[rows].flatten(1), step).reshape(-1, *x0.shape[1:])
            length = self.rate * eps * (1 - step / self.steps)
            x[rows] = project(x[rows] + length * way, x0[rows], eps, self.norm, model.bounds)
            new = ask(x[rows], rows)
            better = new > highest[rows]
            kept[rows[better]], highest[rows[better]] = x[rows[better]], new[better]
        return kept

    def _most(self, x: Tensor) -> int:
        """Return how many queries one forward pass takes."""
        images = _IMAGES_ON_CPU if x.device.type == "cpu" else _IMAGES
        return self.batch or max(2, min(images, _NUMBERS // x[0].numel()))

    def _reach(self, eps: float, share: float = 1.0) -> float:
        """Return h in pixel units, where rel_h is counted in this share of eps."""
        return float(self.h or 0) if self.rel_h is None else self.rel_h * share * eps

    @abstractmethod
    def _guide(self, x0: Tensor, ask: Ask, eps: float, bounds: tuple[float, float]) -> Guide:
        """Return what tells the way, with a memory of its own for each image."""


class ZOO(Differences):
    """Estimate the margin's slope along some coordinates at a time; climb all that are known.

    The loss is eq. 5's difference of log-probabilities, which is that of the logits: the margin.
    Its hinge is left out, as an image that fell is left alone. Coordinates come in random order,
    each once before any comes again. Apart from the ball it differs from the paper in two points:
    a coordinate goes on along its moment until its slope is estimated again, not only when it is;
    and in L2 ADAM's second moment is one for the image (a step has a length), as one for each
    coordinate would lead to a corner of the cube and not to the ball's nearest point.

    A trap: on a staircase differences over the usual ``h = 1e-4`` are exactly 0 unless a threshold
    lies between. That this finds nothing says nothing about robustness: run ``rel_h`` 0.25, 0.5
    and 1 as well, and take the worst.

    Args:
        norm: ``l2`` or ``linf``.
        steps: of ``2 * coordinates + 1`` queries each at most.
        coordinates: whose slopes are estimated in a step, two queries each.
        h: to either side of the coordinate, in pixel units, clipped to the bounds; None: 1e-4,
            unless rel_h is given.
        rel_h: h over eps, in place of h.
        rate: first step's length over eps, in Linf that of each coordinate; steps shrink to 0.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer of large images.
        seed: of the order, which belongs to the image.

    Raises:
        SpecError: an unknown norm, numbers out of range, or both h and rel_h.
    """

    def __init__(self, norm: str = "l2", steps: int = 40, *, coordinates: int = 128,
                 h: float | None = None, rel_h: float | None = None, rate: float = 0.5,
                 batch: int | None = None, seed: int = 0) -> None:
        super().__init__(norm, steps, coordinates, h, rel_h, rate, batch, seed)
        self.coordinates = coordinates

    def _guide(self, x0: Tensor, ask: Ask, eps: float, bounds: tuple[float, float]) -> Guide:
        size, (low, high) = x0[0].numel(), bounds
        h = self._reach(eps)
        width, pairs = -(-size // self.coordinates), max(1, self._most(x0) // 2)
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} zoo"))
                      for image in x0]
        order = torch.zeros(len(x0), size, dtype=torch.long, device=x0.device)
        first, second = torch.zeros(2, len(x0), size, dtype=x0.dtype, device=x0.device)

        def guide(rows: Tensor, x: Tensor, step: int) -> Tensor:
            number, part = divmod(step, width)
            if part == 0:
                order[rows] = torch.stack([torch.randperm(size, generator=generators[i])
                                           for i in rows.tolist()]).to(x.device)
            where = order[rows, part * self.coordinates:(part + 1) * self.coordinates]
            own = torch.arange(len(rows), device=x.device).repeat_interleave(where.shape[1])
            slopes = []
            for image, place in zip(torch.split(own, pairs), torch.split(where.flatten(), pairs),
                                    strict=True):
                here = x[image, place].unsqueeze(1)
                up, down = (here + h).clamp(max=high), (here - h).clamp(min=low)
                at = place.unsqueeze(1)
                points = torch.cat([x[image].scatter(1, at, moved) for moved in (up, down)])
                upper, lower = ask(points, rows[image].repeat(2)).chunk(2)
                slopes.append((upper - lower) / (up - down).squeeze(1).clamp_min(1e-30))
            slope, seen = torch.cat(slopes).reshape(where.shape), (rows.unsqueeze(1), where)
            # moments with the bias taken out: a coordinate was seen number + 1 times
            for moment, beta, value in ((first, _BETAS[0], slope), (second, _BETAS[1], slope ** 2)):
                moment[seen] += (value - moment[seen]) * (1 - beta) / (1 - beta ** (number + 1))
            if self.norm == "l2":
                return ascend(first[rows], "l2")
            way: Tensor = first[rows] / second[rows].sqrt().clamp_min(1e-30)
            return way

        return guide
