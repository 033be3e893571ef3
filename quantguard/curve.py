"""Robust accuracy over eps: a curve that starts at clean accuracy and should end at 0.

Each point has the same attack, so that points can be compared; what breaks at one eps is broken at
every larger one.
"""

from __future__ import annotations

import numpy as np
import torch

from .attacks import PGD, FoolboxModel, PixelModel
from .attacks._foolbox import fb
from .attacks.losses import project
from .evidence import batches
from .images import Images
from .results import CurvePoint
from .spec import Threat

_STEPS = 20
_BELOW, _ABOVE = (0.25, 0.5), 2.0


def accuracy_over_eps(model: PixelModel, data: Images, threat: Threat, batch: int, seed: int,
                      correct: np.ndarray, survived: np.ndarray, images: int,
                      ) -> tuple[tuple[CurvePoint, ...], list[np.ndarray]]:
    """Return the curve over the first images, and what its attacks broke at each eps.

    Eps doubles from a quarter of the threat's until nothing stands, or any pixel may take any
    value. What the suite broke at the threat's own eps counts, there and above.

    Args:
        correct, survived: (N,) bool, of the suite.
        images: from how many images the curve is drawn; 0: there is none.

    Returns:
        Points with ascending eps, from 0; and masks (n,) of what was broken at each eps but 0 by
        an attack that knew nothing of the others.
    """
    n = min(len(correct), images)
    if not n:
        return (), []
    rows = np.flatnonzero(correct[:n])
    low, high = threat.bounds
    widest = (high - low) * (data.pixels[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    fallen = ~correct[:n]
    points, masks = [CurvePoint(0.0, int((~fallen).sum()), n)], []
    sizes = [share * threat.eps for share in _BELOW] + [threat.eps]
    while sizes[-1] < widest and threat.eps > 0:
        sizes.append(min(_ABOVE * sizes[-1], widest))
    for eps in sizes if threat.eps > 0 else ():
        broke = _broken(model, data, threat, batch, seed, rows, n, eps)
        masks.append(broke)
        fallen = fallen | broke
        if eps >= threat.eps:
            fallen = fallen | ~survived[:n]
        points.append(CurvePoint(eps, int((~fallen).sum()), n))
        if eps > threat.eps and fallen.all():
            break
    return tuple(points), masks


def _broken(model: PixelModel, data: Images, threat: Threat, batch: int, seed: int,
            rows: np.ndarray, n: int, eps: float) -> np.ndarray:
    """Return (n,) which of rows fall within eps: through the twin, where there is one."""
    attack = PGD("scaled", _STEPS, rel_step=0.4, decay=True, twin=(2, 32), norm=threat.norm,
                 seed=seed)
    broke = np.zeros(n, dtype=bool)
    first = 0
    for x, y, size in batches(data.pixels, data.labels, rows, batch):
        found = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                           epsilon=eps)
        with torch.no_grad():
            logits = model(project(found, x, eps, threat.norm, threat.bounds))
        fooled = (logits.argmax(1) != y) & logits.isfinite().all(1)
        broke[rows[first : first + size]] = fooled[:size].cpu().numpy()
        first += size
    return broke
