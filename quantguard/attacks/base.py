"""Import of Foolbox, also on a machine without git, and the base class of attacks in a norm."""

from __future__ import annotations

import os
from typing import Any

from ..core.errors import SpecError
from ..core.specs import NORMS

_before = os.environ.get("GIT_PYTHON_REFRESH")
# Foolbox imports GitPython, which raises where git is missing unless this variable is "quiet".
os.environ["GIT_PYTHON_REFRESH"] = "quiet"
try:
    import foolbox as fb
finally:
    if _before is None:
        del os.environ["GIT_PYTHON_REFRESH"]
    else:
        os.environ["GIT_PYTHON_REFRESH"] = _before

__all__ = ["NormBallAttack", "check_norm", "fb"]


def check_norm(norm: str) -> None:
    """Check that a norm is supported.

    Raises:
        SpecError: it is neither linf nor l2.
    """
    if norm not in NORMS:
        raise SpecError(f"norm {norm!r} is unknown", fix=f"Use one of {', '.join(NORMS)}.")


class NormBallAttack(fb.attacks.base.FixedEpsilonAttack):
    """Attack within an Linf or L2 ball of fixed radius; reports its norm to Foolbox."""

    norm: str

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2
