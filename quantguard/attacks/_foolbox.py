"""Import Foolbox, also on a machine without git; what our attacks in one norm share."""

from __future__ import annotations

import os
from typing import Any

from ..errors import SpecError
from ..spec import NORMS

_before = os.environ.get("GIT_PYTHON_REFRESH")
# Foolbox imports GitPython, which raises where no git is found unless told to be quiet.
os.environ["GIT_PYTHON_REFRESH"] = "quiet"
try:
    import foolbox as fb
finally:
    if _before is None:
        del os.environ["GIT_PYTHON_REFRESH"]
    else:
        os.environ["GIT_PYTHON_REFRESH"] = _before

__all__ = ["InNorm", "fb", "known_norm"]


def known_norm(norm: str) -> str:
    """Return norm.

    Raises:
        SpecError: it is neither linf nor l2.
    """
    if norm not in NORMS:
        raise SpecError(f"norm {norm!r} is unknown", fix=f"Use one of {', '.join(NORMS)}.")
    return norm


class InNorm(fb.attacks.base.FixedEpsilonAttack):
    """An attack within a ball of Linf or L2; says to Foolbox which."""

    norm: str

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2
