"""Robust accuracy over eps: a curve that starts at clean accuracy and should end at 0.

Each point has the same attack, so that points can be compared; what breaks at one eps is broken at
every larger one. What it breaks within the threat counts as any attack's there.
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
from .evidence import batches
from .images import Images
from .results import AttackResult, CurvePoint
from .spec import Threat

_STEPS = 20
# What the attack of the curve is called among those of the suite.
LABEL = "accuracy over eps"
_BELOW, _ABOVE = (0.25, 0.5), 2.0


@dataclass(frozen=True)
class Curve:
    """Hold what the attack of the curve did.

    Attributes:
        points: ascending eps, from 0.
        masks: (n,) what was broken at each eps but 0 by an attack that knew nothing of the others.
        result: of these what the threat allows, as an attack on the first n images, where that
            broke any that the suite left standing; else None.
        adversarials: by image, what broke it there.
    """

    points: tuple[CurvePoint, ...] = ()
    masks: tuple[np.ndarray, ...] = ()
    result: AttackResult | None = None
    adversarials: dict[int, np.ndarray] = field(default_factory=dict)


def accuracy_over_eps(model: PixelModel, data: Images, threat: Threat, batch: int, seed: int,
                      correct: np.ndarray, survived: np.ndarray, images: int) -> Curve:
    """Return the curve over the first images.

    Eps doubles from a quarter of the threat's until nothing stands, or any pixel may take any
    value. What the suite broke at the threat's own eps counts, there and above.

    Args:
        correct, survived: (N,) bool, of the suite.
        images: from how many images the curve is drawn; 0: there is none.
    """
    n = min(len(correct), images)
    if not n or threat.eps == 0:
        return Curve((CurvePoint(0.0, int(correct[:n].sum()), n),) if n else ())
    begin, before = time.monotonic(), (model.queries, model.gradients)
    rows = np.flatnonzero(correct[:n])
    low, high = threat.bounds
    widest = (high - low) * (data.pixels[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    fallen = ~correct[:n]
    points, masks = [CurvePoint(0.0, int((~fallen).sum()), n)], []
    sizes = [share * threat.eps for share in _BELOW] + [threat.eps]
    while sizes[-1] < widest:
        sizes.append(min(_ABOVE * sizes[-1], widest))
    # through the twin, where there is one
    attack = PGD("scaled", _STEPS, rel_step=0.4, decay=True, twin=(2, 32), norm=threat.norm,
                 seed=seed)
    found: dict[int, np.ndarray] = {}
    result = None
    for eps in sizes:
        broke = _broken(attack, model, data, threat, batch, rows, n, eps,
                        found if eps <= threat.eps else {})
        masks.append(broke)
        fallen = fallen | broke
        if eps == threat.eps and (fallen & survived[:n]).any():
            result = _result(attack, correct, rows, found, time.monotonic() - begin,
                             model.queries - before[0], model.gradients - before[1])
        if eps >= threat.eps:
            fallen = fallen | ~survived[:n]
        points.append(CurvePoint(eps, int((~fallen).sum()), n))
        if eps > threat.eps and fallen.all():
            break
    return Curve(tuple(points), tuple(masks), result, found if result is not None else {})


def _result(attack: PGD, correct: np.ndarray, rows: np.ndarray, found: Iterable[int],
            seconds: float, queries: int, gradients: int) -> AttackResult:
    attacked, broke = np.zeros_like(correct), np.zeros_like(correct)
    attacked[rows] = True
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
            fooled = fools(model(trial), y)[:size].cpu().numpy()
        here = rows[first : first + size]
        broke[here] = fooled
        for at in np.flatnonzero(fooled):
            found.setdefault(int(here[at]), trial[at].cpu().numpy())
        first += size
    return broke
