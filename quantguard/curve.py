"""Robust accuracy over eps: a curve that starts at clean accuracy and should end at 0.

Each point is of the same images as the headline and has the same attack, so that points can be
compared; what breaks at one eps is broken at every larger one. What it breaks within the threat
counts as any attack's there, and at the threat's own eps the curve's figure is the headline.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from .attacks import PGD, Entry, FoolboxModel, PixelModel
from .attacks._foolbox import fb
from .attacks.losses import fools, project
from .budget import Budget
from .evidence import batches, padded
from .images import Images
from .progress import Progress
from .results import AttackResult, CurvePoint
from .spec import Threat

_STEPS = 20
# What the attack of the curve is called among those of the suite.
LABEL = "accuracy over eps"
_BELOW, _ABOVE = (0.25, 0.5), 2.0
# Points that a curve mostly has, for the ETA.
_POINTS = 5


@dataclass(frozen=True)
class Curve:
    """Hold what the attack of the curve did.

    Attributes:
        points: ascending eps, from 0.
        masks: (n,) what was broken of the first n images at each eps but 0, by an attack that knew
            nothing of the others.
        result: what the attack broke within the threat, where that is any that the suite left
            standing; else None.
        adversarials: by image, what broke it there.
    """

    points: tuple[CurvePoint, ...] = ()
    masks: tuple[np.ndarray, ...] = ()
    result: AttackResult | None = None
    adversarials: dict[int, np.ndarray] = field(default_factory=dict)


def curve_cost(images: int) -> float:
    """Return roughly how many gradients the curve of so many correct images takes, for the ETA."""
    return float(_STEPS * _POINTS * images)


def accuracy_over_eps(model: PixelModel, data: Images, threat: Threat, batch: int, seed: int,
                      correct: np.ndarray, survived: np.ndarray, images: int,
                      budget: Budget, bar: Progress) -> Curve:
    """Return the curve.

    Eps doubles from a quarter of the threat's until nothing stands, or any pixel may take any
    value. What the suite broke at the threat's own eps counts, there and above.

    Args:
        correct, survived: (N,) bool, of the suite.
        images: how many, the first, are attacked anew at each eps; the others only while they
            stand. 0: there is no curve.
        budget: points that there is no time for are left out, which is noted in it.
        bar: shows progress.
    """
    n = len(correct)
    if not images or threat.eps == 0:
        return Curve((CurvePoint(0.0, int(correct.sum()), n),) if images else ())
    begin, before = time.monotonic(), (model.queries, model.gradients)
    low, high = threat.bounds
    widest = (high - low) * (data.pixels[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    fallen = ~correct
    points, masks = [CurvePoint(0.0, int(correct.sum()), n)], []
    tried = np.zeros_like(correct)
    sizes = [share * threat.eps for share in _BELOW] + [threat.eps]
    while sizes[-1] < widest:
        sizes.append(min(_ABOVE * sizes[-1], widest))
    # through the twin, where there is one
    attack = PGD("scaled", _STEPS, rel_step=0.4, decay=True, twin=(2, 32), norm=threat.norm,
                 seed=seed)
    found: dict[int, np.ndarray] = {}
    result = None
    worked = 0.0
    for eps in sizes:
        known = fallen | ~survived if eps >= threat.eps else fallen
        rows = np.flatnonzero(correct & (~known | (np.arange(n) < images)))
        name = f"the curve's attack at eps {eps:.4g}" + " and above" * (eps > threat.eps)
        fits = budget.fitting(name, len(rows), _STEPS * budget.step, whole=True,
                              keep=budget.kept(int((survived & ~fallen).sum())))
        if fits < len(rows) and eps > threat.eps:
            break
        if fits == len(rows):
            broke = _broken(attack, model, data, threat, batch, rows, n, eps,
                            found if eps <= threat.eps else {})
            masks.append(broke[:images])
            fallen = fallen | broke
            tried[rows] |= eps <= threat.eps
            work = min(float(_STEPS * len(rows)), curve_cost(int(correct.sum())) - worked)
            worked += work
            bar.advance(work, f"accuracy at eps {eps:.4g}, {int((~fallen).sum())} standing")
        if eps == threat.eps:
            if (fallen & survived).any():
                result = _result(attack, tried, found, time.monotonic() - begin,
                                 model.queries - before[0], model.gradients - before[1])
            fallen = fallen | ~survived
        if fits == len(rows) or eps == threat.eps:  # there the suite has said what falls
            points.append(CurvePoint(eps, int((~fallen).sum()), n))
        if eps > threat.eps and fallen.all():
            break
    bar.skip(curve_cost(int(correct.sum())) - worked)
    return Curve(tuple(points), tuple(masks), result, found if result is not None else {})


def _result(attack: PGD, attacked: np.ndarray, found: Iterable[int],
            seconds: float, queries: int, gradients: int) -> AttackResult:
    broke = np.zeros_like(attacked)
    broke[list(found)] = True
    settings = Entry(LABEL, attack, "curve", False).settings()
    return AttackResult({**settings, "eps": "a quarter, a half and all of it"}, attacked, broke,
                        None, None, queries, gradients, seconds)


def _broken(attack: PGD, model: PixelModel, data: Images, threat: Threat, batch: int,
            rows: np.ndarray, n: int, eps: float, found: dict[int, np.ndarray]) -> np.ndarray:
    """Return (n,) which of rows fall within eps, and add to found what broke them first."""
    broke = np.zeros(n, dtype=bool)
    first = 0
    for x, y, size in batches(data.pixels, data.labels, rows, batch):
        raw = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                         epsilon=eps)
        trial = project(raw, x, eps, threat.norm, threat.bounds)
        with torch.no_grad():
            answers = model(padded(trial, batch)[0])[:size]  # in a batch of the one size
            fooled = fools(answers, y[:size]).cpu().numpy()
        here = rows[first : first + size]
        broke[here] = fooled
        for at in np.flatnonzero(fooled):
            found.setdefault(int(here[at]), trial[at].cpu().numpy())
        first += size
    return broke
