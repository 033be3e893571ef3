"""Square: random search with square-shaped changes, by queries alone.

Andriushchenko, Croce, Flammarion, Hein 2020, arXiv:1912.00049, algorithms 1, 2 (Linf) and 3 (L2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..errors import SpecError
from ._foolbox import InNorm, fb, known_norm
from .bridge import labels_of, module_of
from .losses import margin, project
from .noise import seed_of
from .pgd import Kept

# Section 4: the share of pixels changed at a time starts at p and is halved at these iterations of
# 10,000; a shorter search scales them.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# The smallest window of L2, 3 by 3 pixels; what is smaller is tried every fourth time.
_SMALLEST = 9

# (sizes beside the first) -> uniform numbers (N, *sizes), each image's own
Drawn = Callable[..., Tensor]


def bump(rows: int, columns: int) -> Tensor:
    """Return L2's change of one window, (rows, columns), of unit length, with a left and a right.

    Each half is largest in its middle and falls off to its edge: one number in equation 2 for
    each ring around the middle; and the right half is negative.
    """
    halves = []
    for width in (columns // 2, columns - columns // 2):
        down, across = ((torch.arange(size) - size // 2).abs() for size in (rows, width))
        ring = torch.maximum(down.unsqueeze(1), across)
        rings = torch.arange(1, max(rows, width) // 2 + 2).double() ** -2
        halves.append(rings.flip(0).cumsum(0).flip(0)[ring].float())
    whole = torch.cat([halves[0], -halves[1]], dim=1)
    unit: Tensor = whole / whole.norm()
    return unit


def placed(where: Tensor, size: tuple[int, int], within: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the rows (N, height) and columns (N, width) of an image as a window of it counts them.

    Args:
        where: (N, 2) uniform numbers, which say where the window is.
        size: the window's rows and columns; outside it counts are negative or beyond them.
        within: the image's height and width.
    """
    counts = []
    for number, few, all_ in zip(where.unbind(1), size, within, strict=True):
        first = (number * (all_ - few + 1)).long().clamp(max=all_ - few)
        counts.append(torch.arange(all_, device=where.device) - first.unsqueeze(1))
    return counts[0], counts[1]


def inside(down: Tensor, across: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which pixels (N, 1, height, width) a window holds, see :func:`placed`."""
    tall, wide = (down >= 0) & (down < size[0]), (across >= 0) & (across < size[1])
    return (tall.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1)


class Square(InNorm):
    """Change one random square at a time, and keep what raises the margin.

    In Linf a square goes to a corner of the ball; in L2 it takes over what another square has of
    the budget. Each image has its own random numbers, so that its result does not depend on its
    batch.

    L2 departs from the paper once windows have come down to 3 by 3 pixels: every fourth is then as
    small as its share says and takes over a random part only. Without that the search gets stuck
    on small images, well before the strongest point.

    Args:
        steps: squares tried, each one query; the stripes (L2: tiles) it starts from are the first.
        p: share of pixels changed at the start.
        seed: of the squares.
        norm: ``linf`` or ``l2``.

    Raises:
        SpecError: an unknown norm, or numbers out of range.
    """

    def __init__(self, steps: int = 1000, p: float = 0.8, seed: int = 0,
                 norm: str = "linf") -> None:
        if steps < 2 or not 0 < p <= 1:
            raise SpecError(f"steps={steps} must be at least 2, and p={p} in (0, 1]")
        known_norm(norm)
        self.steps, self.p, self.seed, self.norm = steps, p, seed, norm

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
        module = module_of(model)
        # (N, C, H, W): features are an image one pixel high
        images = x if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)
        pixels = images[0, 0].numel()
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} square"))
                      for image in x]

        kept = Kept(x, labels)

        def drawn(*size: int) -> Tensor:
            return torch.stack([torch.rand(size, generator=generators[row])
                                for row in kept.rows.tolist()]).to(x.device)

        search = (_Corners if self.norm == "linf" else _Bumps)(images, eps, model.bounds, drawn)
        best = search.start()
        logits = module(best.reshape(x.shape))
        highest = margin(logits, labels)
        kept.judge(best.reshape(x.shape), logits)
        for step in range(1, self.steps):
            if bool(kept.fallen.all()):
                break
            keep = kept.standing()
            if keep is not None:
                best, highest, labels = best[keep], highest[keep], labels[keep]
                search.keep(keep)
            share = self.p / 2 ** sum(step > h * self.steps / 10_000 for h in _HALVINGS)
            trial = search.trial(best, share * pixels, step)
            points = trial.reshape(-1, *x.shape[1:])
            logits = module(points)
            kept.judge(points, logits)
            value = margin(logits, labels)
            better = value > highest
            best[better], highest[better] = trial[better], value[better]
        return kept.points


class _Proposals:
    """Propose points: the first ones, and changes of the best so far.

    Args:
        x: (N, C, H, W).
    """

    def __init__(self, x: Tensor, eps: float, bounds: tuple[float, float], drawn: Drawn) -> None:
        self.x, self.eps, self.bounds, self.drawn = x, eps, bounds, drawn
        _, self.channels, self.height, self.width = x.shape

    def keep(self, rows: Tensor) -> None:
        """Go on with these images alone."""
        self.x = self.x[rows]

    def size(self, area: float) -> tuple[int, int]:
        """Return rows and columns of a window of area pixels, a square where it fits."""
        rows = min(max(1, round(math.sqrt(area))), self.height)
        return rows, min(max(1, round(area / rows)), self.width)


class _Corners(_Proposals):
    """Algorithm 2: in Linf, squares at +-eps."""

    least: Tensor
    most: Tensor

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.least, self.most = self.least[rows], self.most[rows]

    def start(self) -> Tensor:
        """Return stripes, one pixel wide: images are known to be sensitive to them."""
        self.least, self.most = ((self.x + e).clamp(*self.bounds) for e in (-self.eps, self.eps))
        up = self.drawn(self.channels, 1, self.width) >= 0.5
        return torch.where(up, self.most, self.least)

    def trial(self, best: Tensor, area: float, step: int) -> Tensor:
        """Return best with one window of each image at a corner of the ball."""
        size, where = self.size(area), self.drawn(2 + self.channels)
        square = inside(*placed(where[:, :2], size, (self.height, self.width)), size)
        up = (where[:, 2:] < 0.5).reshape(-1, self.channels, 1, 1)
        return torch.where(square, torch.where(up, self.most, self.least), best)


class _Bumps(_Proposals):
    """Algorithm 3: in L2, one window takes over another one's share of the norm."""

    def start(self) -> Tensor:
        """Return tiles, a fifth of the image wide, each a bump with a random sign."""
        tile = (max(1, self.height // 5), max(1, self.width // 5))
        count = (-(-self.height // tile[0]), -(-self.width // tile[1]))
        signs = self._signs(self.drawn(self.channels, *count))
        signs = signs.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
        nu = (bump(*tile).to(self.x.device).repeat(count) * signs)[..., :self.height, :self.width]
        length = nu.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return project(self.x + self.eps * nu / length, self.x, self.eps, "l2", self.bounds)

    def trial(self, best: Tensor, area: float, step: int) -> Tensor:
        """Return best with the norm of window W2 of each image gone to window W1."""
        fine = area < _SMALLEST and step % 4 == 1
        size = self.size(area if fine else max(area, _SMALLEST))
        within = (self.height, self.width)
        where = self.drawn(6 + self.channels)
        down, across = placed(where[:, :2], size, within)
        w1 = inside(down, across, size)
        w2 = inside(*placed(where[:, 2:4], size, within), size) & ~w1
        eta = torch.where((where[:, 4] < 0.5).reshape(-1, 1, 1),
                          self._window(bump(*size), down, across),
                          self._window(bump(*size[::-1]).T, down, across)).unsqueeze(1)
        nu = best - self.x
        kept = (0.5 + where[:, 5].reshape(-1, 1, 1, 1) / 2) * fine  # W2 keeps so much, else none
        unused = (self.eps ** 2 - nu.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
        budget = self._norm(nu * w1) ** 2 + (1 - kept ** 2) * self._norm(nu * w2) ** 2 \
            + unused / self.channels
        way = self._signs(where[:, 6:, None, None]) * eta * w1 \
            + nu * w1 / self._norm(nu * w1).clamp_min(1e-12)
        way = way / self._norm(way).clamp_min(1e-12) * budget.sqrt()
        nu = torch.where(w1, way, torch.where(w2, kept * nu, nu))
        return project(self.x + nu, self.x, self.eps, "l2", self.bounds)

    @staticmethod
    def _window(values: Tensor, down: Tensor, across: Tensor) -> Tensor:
        """Return an image (N, height, width) that holds values wherever the window is."""
        rows, columns = values.shape
        return values.to(down.device)[down.clamp(0, rows - 1).unsqueeze(2),
                                      across.clamp(0, columns - 1).unsqueeze(1)]

    @staticmethod
    def _norm(nu: Tensor) -> Tensor:
        """Return the length of each channel, (N, C, 1, 1)."""
        length: Tensor = nu.flatten(2).norm(dim=2)
        return length[..., None, None]

    @staticmethod
    def _signs(uniform: Tensor) -> Tensor:
        return torch.where(uniform < 0.5, -1.0, 1.0)
