"""Square: random search with square-shaped changes, a black-box attack on logits.

Andriushchenko, Croce, Flammarion, Hein 2020, arXiv:1912.00049, algorithms 1, 2 (Linf) and 3 (L2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..core.errors import SpecError
from .base import NormBallAttack, check_norm, fb
from .foolbox_model import labels_of, module_of
from .gradient_attack import BestFound
from .losses import margin, project
from .noise import seed_of

# Section 4: the share of pixels in a square starts at p and is halved at these iterations of
# 10,000; a shorter search scales them.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Pixels of the smallest window in L2, 3 by 3; smaller ones are tried in every fourth step only.
_SMALLEST = 9

# (*sizes) -> uniform numbers (N, *sizes), from a generator for each image
Draw = Callable[..., Tensor]


def bump(rows: int, columns: int) -> Tensor:
    """Return the change of one window in L2, (rows, columns), of unit length.

    Its left half is positive and its right half negative. Each half is largest in its middle and
    decreases towards its edge, by equation 2: one value for each ring around the middle.
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
    """Return coordinates of an image's rows (N, height) and columns (N, width) in a random window.

    They start from 0 at the window's corner; outside the window they are negative or too large.

    Args:
        where: (N, 2) uniform numbers, which determine the window's position.
        size: the window's rows and columns.
        within: the image's height and width.
    """
    coordinates = []
    for uniform, length, total in zip(where.unbind(1), size, within, strict=True):
        corner = (uniform * (total - length + 1)).long().clamp(max=total - length)
        coordinates.append(torch.arange(total, device=where.device) - corner.unsqueeze(1))
    return coordinates[0], coordinates[1]


def inside(down: Tensor, across: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which pixels (N, 1, height, width) are in a window, see :func:`placed`."""
    tall, wide = (down >= 0) & (down < size[0]), (across >= 0) & (across < size[1])
    return (tall.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1)


class Square(NormBallAttack):
    """Random search that changes one square at a time and accepts changes that raise the margin.

    In Linf a square is set to a corner of the ball; in L2 it takes over the norm of another
    square. Random numbers are drawn for each image separately, so that its result does not depend
    on its batch.

    L2 differs from the paper once windows have shrunk to 3 by 3 pixels: every fourth window is
    then as small as the schedule says, and takes over a random share of the norm only. Without
    this the search stalls on small images, well before the strongest point.

    Args:
        steps: queries; the first is for the initial stripes (L2: tiles), the others try a square.
        p: share of pixels in the first squares.
        seed: of the squares.
        norm: ``linf`` or ``l2``.

    Raises:
        SpecError: an unknown norm, or numbers out of range.
    """

    def __init__(self, steps: int = 1000, p: float = 0.8, seed: int = 0,
                 norm: str = "linf") -> None:
        if steps < 2 or not 0 < p <= 1:
            raise SpecError(f"steps={steps} must be at least 2, and p={p} in (0, 1]")
        check_norm(norm)
        self.steps, self.p, self.seed, self.norm = steps, p, seed, norm

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first point that fools the model, else the strongest."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        x: Tensor = wrapped.raw
        found = self._search(model, x, labels_of(criterion), epsilon)
        return restore(ep.astensor(found))

    @torch.no_grad()
    def _search(self, model: Any, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        module = module_of(model)
        # (N, C, H, W): other shapes are treated as images one pixel high
        images = x if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)
        pixels = images[0, 0].numel()
        generators = [torch.Generator().manual_seed(seed_of(image, f"{self.seed} square"))
                      for image in x]

        found = BestFound(x, labels)

        def draw(*size: int) -> Tensor:
            return torch.stack([torch.rand(size, generator=generators[row])
                                for row in found.rows.tolist()]).to(x.device)

        search = (_Corners if self.norm == "linf" else _Bumps)(images, eps, model.bounds, draw)
        best = search.start()
        logits = module(best.reshape(x.shape))
        highest = margin(logits, labels)
        found.judge(best.reshape(x.shape), logits)
        for step in range(1, self.steps):
            if bool(found.already_fooled.all()):
                break
            rows = found.survivors()
            if rows is not None:
                best, highest, labels = best[rows], highest[rows], labels[rows]
                search.select(rows)
            share = self.p / 2 ** sum(step > h * self.steps / 10_000 for h in _HALVINGS)
            trial = search.trial(best, share * pixels, step)
            points = trial.reshape(-1, *x.shape[1:])
            logits = module(points)
            found.judge(points, logits)
            value = margin(logits, labels)
            better = value > highest
            best[better], highest[better] = trial[better], value[better]
        return found.points


class _Proposals:
    """Generator of candidates: initial points, and changes of the best points so far.

    Args:
        x: (N, C, H, W) images.
    """

    def __init__(self, x: Tensor, eps: float, bounds: tuple[float, float], draw: Draw) -> None:
        self.x, self.eps, self.bounds, self.draw = x, eps, bounds, draw
        _, self.channels, self.height, self.width = x.shape

    def select(self, rows: Tensor) -> None:
        """Continue with these images only."""
        self.x = self.x[rows]

    def size(self, area: float) -> tuple[int, int]:
        """Return rows and columns of a window of this many pixels, a square if it fits."""
        rows = min(max(1, round(math.sqrt(area))), self.height)
        return rows, min(max(1, round(area / rows)), self.width)


class _Corners(_Proposals):
    """Proposals in Linf (algorithm 2): squares at +-eps."""

    least: Tensor
    most: Tensor

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.least, self.most = self.least[rows], self.most[rows]

    def start(self) -> Tensor:
        """Return vertical stripes, one pixel wide, to which networks are known to be sensitive."""
        self.least, self.most = ((self.x + e).clamp(*self.bounds) for e in (-self.eps, self.eps))
        up = self.draw(self.channels, 1, self.width) >= 0.5
        return torch.where(up, self.most, self.least)

    def trial(self, best: Tensor, area: float, step: int) -> Tensor:
        """Return best with one window of each image at a corner of the ball."""
        size, where = self.size(area), self.draw(2 + self.channels)
        square = inside(*placed(where[:, :2], size, (self.height, self.width)), size)
        up = (where[:, 2:] < 0.5).reshape(-1, self.channels, 1, 1)
        return torch.where(square, torch.where(up, self.most, self.least), best)


class _Bumps(_Proposals):
    """Proposals in L2 (algorithm 3): one window takes over the norm of another."""

    def start(self) -> Tensor:
        """Return tiles, a fifth of the image wide, each a bump with a random sign."""
        tile = (max(1, self.height // 5), max(1, self.width // 5))
        count = (-(-self.height // tile[0]), -(-self.width // tile[1]))
        signs = self._signs(self.draw(self.channels, *count))
        signs = signs.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
        nu = (bump(*tile).to(self.x.device).repeat(count) * signs)[..., :self.height, :self.width]
        length = nu.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return project(self.x + self.eps * nu / length, self.x, self.eps, "l2", self.bounds)

    def trial(self, best: Tensor, area: float, step: int) -> Tensor:
        """Return best with the norm of window W2 of each image moved to window W1."""
        fine = area < _SMALLEST and step % 4 == 1
        size = self.size(area if fine else max(area, _SMALLEST))
        within = (self.height, self.width)
        where = self.draw(6 + self.channels)
        down, across = placed(where[:, :2], size, within)
        w1 = inside(down, across, size)
        w2 = inside(*placed(where[:, 2:4], size, within), size) & ~w1
        eta = torch.where((where[:, 4] < 0.5).reshape(-1, 1, 1),
                          self._window(bump(*size), down, across),
                          self._window(bump(*size[::-1]).T, down, across)).unsqueeze(1)
        nu = best - self.x
        rest = (0.5 + where[:, 5].reshape(-1, 1, 1, 1) / 2) * fine  # share that stays in W2
        unused = (self.eps ** 2 - nu.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
        budget = self._norm(nu * w1) ** 2 + (1 - rest ** 2) * self._norm(nu * w2) ** 2 \
            + unused / self.channels
        way = self._signs(where[:, 6:, None, None]) * eta * w1 \
            + nu * w1 / self._norm(nu * w1).clamp_min(1e-12)
        way = way / self._norm(way).clamp_min(1e-12) * budget.sqrt()
        nu = torch.where(w1, way, torch.where(w2, rest * nu, nu))
        return project(self.x + nu, self.x, self.eps, "l2", self.bounds)

    @staticmethod
    def _window(values: Tensor, down: Tensor, across: Tensor) -> Tensor:
        """Return an image (N, height, width) with the values inside the window."""
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
        """Return random signs made of uniform numbers."""
        return torch.where(uniform < 0.5, -1.0, 1.0)
