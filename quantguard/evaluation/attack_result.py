"""Results of single attacks, and points of the curve of accuracy over eps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class AttackResult:
    """Result of one attack.

    Attributes:
        settings: class and every hyper-parameter.
        attacked: (N,) images that it ran on.
        broken: (N,) images that it broke within the threat, checked by the model itself.
        own_success: a minimum-norm attack's own number of successes, before its adversarials are
            clipped to the threat; None for other attacks.
        median_norm: a minimum-norm attack's own median L2 norm; None for other attacks.
        queries: images passed forward.
        gradients: images passed forward and backward.
        seconds: wall time.
        error: one line of the error that it raised, after which ``attacked`` holds only images
            that it had finished. None: it raised no error.
    """

    settings: dict[str, Any]
    attacked: np.ndarray = field(repr=False)
    broken: np.ndarray = field(repr=False)
    own_success: int | None
    median_norm: float | None
    queries: int
    gradients: int
    seconds: float
    error: str | None = None

    @property
    def label(self) -> str:
        """Return the attack's name."""
        return str(self.settings["label"])

    @property
    def group(self) -> str:
        """Return the attack's group, see :class:`quantguard.attacks.Entry`."""
        return str(self.settings["group"])


@dataclass(frozen=True)
class CurvePoint:
    """One point of accuracy over eps: the number of survivors at that eps."""

    eps: float
    survivors: int
    images: int
