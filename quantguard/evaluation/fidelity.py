"""Fidelity: how well a gradient predicts the changes of the margin that it is a gradient of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.losses import input_gradient, margin
from ..attacks.noise import image_noise
from ..attacks.predictions import batches, predict
from ..data.images import Images
from ..nn.contexts import backward
from ..nn.pool_reordering import pools_first
from .task import EvaluationTask
from .time_limit import FIDELITY_SHARE, Budget

# The name of the softened model's fidelity to its own changes.
ITSELF = "softened k 2, of itself"
# Fidelity is measured on at most this many images, and on fewer if they are large.
_IMAGES, _LARGE_IMAGES = 64, 8
_DIRECTIONS = 64
# The sharpness at which the softened model is smoothest.
_SMOOTH = 2.0
# With little time fidelity is measured on fewer images and in fewer directions, but on no fewer.
_FEWEST_IMAGES, _FEWEST_DIRECTIONS = 4, 16


def fidelity(task: EvaluationTask, budget: Budget) -> dict[str, float]:
    """Return the fidelity of each surrogate gradient.

    For each correct image, take the correlation over random sign directions d between the change
    of the margin from ``x - h d`` to ``x + h d``, h = eps / 4, and the gradient's derivative in
    direction d; 0 where either is constant. The fidelity is the median over images. If the model
    is softened for attacks, the dictionary also has the softened model's fidelity to its own
    changes. With little time fewer images and then fewer directions are used, which the budget
    lists; with less time the dictionary is empty.
    """
    model, pixels, labels = task.model, task.images.pixels, task.images.labels
    model.find_step_functions(pixels)
    rows = _rows(task.images, task.correct)
    # counted in forward passes; one gradient costs little beside them
    passes = 2 * _DIRECTIONS * len(rows)
    few = budget.fitting("fidelity", passes, budget.forward, share=FIDELITY_SHARE, noun="answers")
    directions = _DIRECTIONS
    if few < passes:
        rows = rows[:max(few // (2 * _DIRECTIONS), min(_FEWEST_IMAGES, len(rows)))]
        directions = min(_DIRECTIONS, few // (2 * max(len(rows), 1)))
    if not len(rows) or directions < _FEWEST_DIRECTIONS:
        return {}
    x, y, h = pixels[rows], labels[rows], task.threat.eps / 4
    unit = torch.stack([image_noise(x, "linf", task.seed, f"fidelity {i}").sign()
                        for i in range(directions)])
    if task.threat.norm == "l2":
        unit = unit / x[0].numel() ** 0.5
    # Some models accept no pixel outside the bounds, so the clipped differences are used below.
    up, down = (torch.stack([(x + side * d).clamp(*task.threat.bounds) for d in unit])
                for side in (h, -h))

    def changes(count: int) -> Tensor:
        """Return the margin's change from down to up in the first directions, (count, n)."""
        one, other = (margin(torch.cat([
            predict(model, torch.cat(lot), task.batch, attacked=True)
            for lot in _lots(iter(side[:count]), max(1, task.batch // len(x)))]), y.repeat(count))
            for side in (up, down))
        return (one - other).reshape(count, -1).nan_to_num(0.0, 0.0, 0.0)

    def slopes() -> Tensor:
        """Return the changes that the gradient predicts, (directions, n)."""
        gradient = torch.cat([
            input_gradient(model, images, classes, "margin")[0][:size]
            for images, classes, size in batches(pixels, labels, rows, task.batch)])
        return ((up - down) * gradient).flatten(2).sum(2)
    found, true = {}, changes(directions)
    surrogates: dict[str, AbstractContextManager[Any]] = {}
    if model.quantized:
        surrogates = {mode: backward(model, mode) for mode in ("ramp", "sigmoid(8)")}
    elif not model.softenable:
        surrogates = {"gradient": nullcontext()}
    for name, surrogate in surrogates.items():
        with surrogate, pools_first(model):
            found[name] = float(_correlation(true, slopes()).median())
    if model.quantized or model.softenable:
        with model.softened(8.0):
            found["softened k 8"] = float(_correlation(true, slopes()).median())
        with model.softened(_SMOOTH):
            few = min(directions, _FEWEST_DIRECTIONS)
            found[ITSELF] = float(_correlation(changes(few), slopes()[:few]).median())
    return found


def fidelity_cost(images: Images, correct: np.ndarray) -> float:
    """Return roughly how many gradients fidelity costs, for the ETA."""
    return 2 * _DIRECTIONS * len(_rows(images, correct)) / 3


def _rows(images: Images, correct: np.ndarray) -> np.ndarray:
    """Return the correct images that fidelity is measured on if there is time."""
    small = images.pixels[0].numel() <= 3 * 64 * 64
    return np.flatnonzero(correct)[:_IMAGES if small else _LARGE_IMAGES]


def _lots(values: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yield the values in lists of at most a size."""
    values = iter(values)
    while lot := list(itertools.islice(values, size)):
        yield lot


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation over the first dimension; 0 where either is constant."""
    a, b = (v.double() - v.double().mean(0) for v in (a, b))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 0, (a * b).sum(0) / scale.clamp_min(1e-300), 0.0)
