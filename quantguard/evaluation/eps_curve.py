"""Robust accuracy over eps: a curve that starts at clean accuracy and should end at 0.

All points use the same images and the same attack, so that they can be compared. An image that is
broken at one eps counts as broken at every larger one. What the curve's attack breaks within the
threat counts like any other attack's, so that the curve agrees with the headline at the threat's
own eps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..attacks import PGD, Entry, FoolboxModel
from ..attacks.base import fb
from ..attacks.losses import fools, project
from ..attacks.predictions import batches, padded
from ..core.progress import Progress
from .attack_result import AttackResult, CurvePoint
from .task import EvaluationTask
from .time_limit import Budget

_STEPS = 20
# The label of the curve's attack among those of the suite.
LABEL = "accuracy over eps"
_BELOW, _ABOVE = (0.25, 0.5), 2.0
# The usual number of points, for the ETA.
_POINTS = 5


@dataclass(frozen=True)
class Curve:
    """Result of the curve's attack.

    Attributes:
        points: ascending eps, from 0.
        masks: (n,) which of the first n images were broken at each eps but 0, each independently
            of the other eps.
        result: what the attack broke within the threat, if it broke survivors of the suite; else
            None.
        adversarials: the adversarials of ``result``, by image.
    """

    points: tuple[CurvePoint, ...] = ()
    masks: tuple[np.ndarray, ...] = ()
    result: AttackResult | None = None
    adversarials: dict[int, np.ndarray] = field(default_factory=dict)


def curve_cost(images: int) -> float:
    """Return roughly how many gradients the curve of some correct images costs, for the ETA."""
    return float(_STEPS * _POINTS * images)


def accuracy_over_eps(task: EvaluationTask, survived: np.ndarray, independent: int,
                      budget: Budget, bar: Progress) -> Curve:
    """Return the curve.

    Eps doubles from a quarter of the threat's until nothing survives, or any pixel may take any
    value. From the threat's own eps on, what the suite broke counts as broken.

    Args:
        task: model, images and threat.
        survived: (N,) images that survive the suite.
        independent: the first images, this many, are attacked again at each eps; the others only
            while they survive. 0: there is no curve.
        budget: points that there is no time for are listed in it.
        bar: shows progress.
    """
    model, threat, correct = task.model, task.threat, task.correct
    n = len(correct)
    if not independent or threat.eps == 0:
        return Curve((CurvePoint(0.0, int(correct.sum()), n),) if independent else ())
    begin, before = time.monotonic(), (model.queries, model.gradients)
    low, high = threat.bounds
    pixels = task.images.pixels[0].numel()
    widest = (high - low) * (pixels ** 0.5 if threat.norm == "l2" else 1.0)
    already_fooled = ~correct
    points, masks = [CurvePoint(0.0, int(correct.sum()), n)], []
    tried = np.zeros_like(correct)
    sizes = [share * threat.eps for share in _BELOW] + [threat.eps]
    while sizes[-1] < widest:
        sizes.append(min(_ABOVE * sizes[-1], widest))
    # through the softened model, if there is one
    attack = PGD("scaled", _STEPS, rel_step=0.4, decay=True, sharpness=(2, 32), norm=threat.norm,
                 seed=task.seed)
    found: dict[int, np.ndarray] = {}
    result = None
    done = 0.0
    for eps in sizes:
        known = already_fooled | ~survived if eps >= threat.eps else already_fooled
        rows = np.flatnonzero(correct & (~known | (np.arange(n) < independent)))
        name = f"the curve's attack at eps {eps:.4g}" + (" and above" if eps > threat.eps else "")
        fits = budget.fitting(name, len(rows), _STEPS * budget.step, whole=True,
                              reserve=budget.reserved(int((survived & ~already_fooled).sum())))
        if fits < len(rows) and eps > threat.eps:
            break
        if fits == len(rows):
            broken = _broken(attack, task, rows, eps, found if eps <= threat.eps else {})
            masks.append(broken[:independent])
            already_fooled = already_fooled | broken
            tried[rows] |= eps <= threat.eps
            work = min(float(_STEPS * len(rows)), curve_cost(int(correct.sum())) - done)
            done += work
            bar.advance(work, f"accuracy at eps {eps:.4g}: {int((~already_fooled).sum())} of {n}")
        if eps == threat.eps:
            if (already_fooled & survived).any():
                result = _result(attack, tried, found, time.monotonic() - begin,
                                 model.queries - before[0], model.gradients - before[1])
            already_fooled = already_fooled | ~survived
        if fits == len(rows) or eps == threat.eps:  # the suite's own figure at the threat's eps
            points.append(CurvePoint(eps, int((~already_fooled).sum()), n))
        if eps > threat.eps and already_fooled.all():
            break
    bar.skip(curve_cost(int(correct.sum())) - done)
    return Curve(tuple(points), tuple(masks), result, found if result is not None else {})


def _result(attack: PGD, attacked: np.ndarray, found: Iterable[int],
            seconds: float, queries: int, gradients: int) -> AttackResult:
    """Return the result of the curve's attack within the threat."""
    broken = np.zeros_like(attacked)
    broken[list(found)] = True
    settings = Entry(LABEL, attack, "curve", False).settings()
    return AttackResult({**settings, "eps": "a quarter, a half and all of it"}, attacked, broken,
                        None, None, queries, gradients, seconds)


def _broken(attack: PGD, task: EvaluationTask, rows: np.ndarray, eps: float,
            found: dict[int, np.ndarray]) -> np.ndarray:
    """Return (N,) which of the rows are broken within eps, and add new adversarials to found."""
    model, threat = task.model, task.threat
    broken = np.zeros(len(task.correct), dtype=bool)
    first = 0
    for x, y, size in batches(task.images.pixels, task.images.labels, rows, task.batch):
        raw = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                         epsilon=eps)
        trial = project(raw, x, eps, threat.norm, threat.bounds)
        with torch.no_grad():
            logits = model(padded(trial, task.batch)[0])[:size]  # in a batch of the common size
            fooled = fools(logits, y[:size]).cpu().numpy()
        here = rows[first : first + size]
        broken[here] = fooled
        for at in np.flatnonzero(fooled):
            found.setdefault(int(here[at]), trial[at].cpu().numpy())
        first += size
    return broken
