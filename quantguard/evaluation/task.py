"""The task of an evaluation: what every attack and check of it works on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..attacks import PixelModel
from ..core.specs import Threat
from ..data.images import Images


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class EvaluationTask:
    """Model, images and threat of one evaluation.

    Attributes:
        model: the model, which takes pixels.
        images: N images and their labels.
        threat: norm, eps and bounds.
        batch: the size of all batches.
        correct: (N,) bool, images that are classified correctly without an attack.
        seed: of every random start.
    """

    model: PixelModel
    images: Images
    threat: Threat
    batch: int
    correct: np.ndarray = field(repr=False)
    seed: int
