"""Base class of attacks by finite differences: they query logits, and use no gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..core.errors import SpecError
from .base import NormBallAttack, check_norm, fb
from .foolbox_model import labels_of, module_of
from .losses import height, project

# Limits of one forward pass, in numbers and in images. On a CPU larger batches are slower, since
# they do not fit into its cache.
_NUMBERS, _IMAGES, _IMAGES_ON_CPU = 2 ** 22, 4096, 64
# (points (K, F), index of each point's image (K,)) -> their margins (K,): one query each
MarginQuery = Callable[[Tensor, Tensor], Tensor]
# (indices of surviving images (n,), their points (n, F), step) -> ascent directions (n, F)
Direction = Callable[[Tensor, Tensor, int], Tensor]


class FiniteDifferenceAttack(NormBallAttack, ABC):
    """Ascent on the margin in the eps ball, along a direction estimated from differences.

    A broken image takes no further queries. Queries stay within the bounds, but may leave the
    ball; only points of the ball are returned.

    Args:
        norm: ``linf`` or ``l2``.
        steps: at most; after each, one query an image judges the new point.
        differences: number of differences in a step, two queries each.
        h: distance of the queries from the point, in pixel units; None: 1e-4, unless rel_h is set.
        rel_h: h over eps, instead of h.
        rate: first step's length over eps; steps shrink linearly to 0.
        batch: queries in one forward pass; None: 4096 (on a CPU 64), fewer for large images.
        seed: of the random numbers, which also depend on the image.

    Raises:
        SpecError: an unknown norm, numbers out of range, or both h and rel_h.
    """

    def __init__(self, norm: str, steps: int, differences: int, h: float | None,
                 rel_h: float | None, rate: float, batch: int | None, seed: int) -> None:
        check_norm(norm)
        if steps < 1 or differences < 1:
            raise SpecError(f"steps={steps} and the differences in a step, {differences}, must be "
                            "at least 1")
        if h is not None and rel_h is not None:
            raise SpecError(f"h={h} and rel_h={rel_h} exclude each other", fix="Pass one of them.")
        h = 1e-4 if h is None and rel_h is None else h
        if not (h or rel_h or 0) > 0 or not rate > 0:
            raise SpecError(f"h={h} (or rel_h={rel_h}, if set) and rate={rate} must be above 0")
        if batch is not None and batch < 2:
            raise SpecError(f"batch={batch} must be at least 2: a difference is two queries")
        self.norm, self.steps, self.h, self.rel_h, self.rate = norm, steps, h, rel_h, rate
        self.batch, self.seed = batch, seed

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first point that fools the model, else the strongest."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        found = self._search(model, wrapped.raw, labels_of(criterion), epsilon)
        return restore(ep.astensor(found))

    @torch.no_grad()
    def _search(self, model: Any, x0: Tensor, labels: Tensor, eps: float) -> Tensor:
        module, chunk = module_of(model), self._queries_at_once(x0)

        def query(points: Tensor, owner: Tensor) -> Tensor:
            chunks = zip(torch.split(points, chunk), torch.split(owner, chunk), strict=True)
            return torch.cat([height(module(p.reshape(-1, *x0.shape[1:])), labels[o])
                              for p, o in chunks])

        x, best = x0.clone(), x0.clone()
        highest = query(x0, torch.arange(len(x0), device=x0.device))
        direction = self._direction(x0, query, eps, model.bounds)
        for step in range(self.steps if eps > 0 else 0):
            rows = (highest <= 0).nonzero().squeeze(1)
            if not len(rows):
                break
            way = direction(rows, x[rows].flatten(1), step).reshape(-1, *x0.shape[1:])
            length = self.rate * eps * (1 - step / self.steps)
            x[rows] = project(x[rows] + length * way, x0[rows], eps, self.norm, model.bounds)
            new = query(x[rows], rows)
            better = new > highest[rows]
            best[rows[better]], highest[rows[better]] = x[rows[better]], new[better]
        return best

    def _queries_at_once(self, x: Tensor) -> int:
        """Return the number of queries in one forward pass."""
        images = _IMAGES_ON_CPU if x.device.type == "cpu" else _IMAGES
        return self.batch or max(2, min(images, _NUMBERS // x[0].numel()))

    def _reach(self, eps: float, share: float = 1.0) -> float:
        """Return h in pixel units; rel_h is relative to this share of eps."""
        return float(self.h or 0) if self.rel_h is None else self.rel_h * share * eps

    @abstractmethod
    def _direction(self, x0: Tensor, query: MarginQuery, eps: float,
                   bounds: tuple[float, float]) -> Direction:
        """Return the function that estimates directions; it keeps state for each image."""
