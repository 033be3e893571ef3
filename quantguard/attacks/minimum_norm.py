"""Minimum-norm attacks by gradients: Carlini & Wagner, DDN and DeepFool, through Foolbox."""

from __future__ import annotations

from typing import Any

from ..core.errors import SpecError
from .base import check_norm, fb
from .foolbox_bridge import FoolboxBridge, check_positive


class CarliniWagner(FoolboxBridge, fb.attacks.L2CarliniWagnerAttack):
    """C&W in L2 (Carlini, Wagner 2017, arXiv:1608.04644); every image gets all steps.

    Foolbox's early stop is switched off, as it depends on the loss of the whole batch.

    Args:
        binary_search_steps: over the constant c.
        steps: of Adam for each constant.
        stepsize: of Adam, in the space of arctanh.
        initial_const: initial c, for pixels on (0, 1).
    """

    def __init__(self, binary_search_steps: int = 5, steps: int = 60, *, stepsize: float = 0.05,
                 initial_const: float = 1.0) -> None:
        check_positive(binary_search_steps=binary_search_steps, steps=steps, stepsize=stepsize,
                  initial_const=initial_const)
        super().__init__(binary_search_steps, steps, stepsize, 0, initial_const, False)
        self.norm = "l2"


class DDN(FoolboxBridge, fb.attacks.DDNAttack):
    """Decoupled direction and norm, L2 (Rony et al. 2019, arXiv:1811.09600).

    Where the gradient is zero it continues in a random direction, seeded by the image.

    Args:
        steps: gradient steps.
        init_epsilon: first radius, for pixels on (0, 1).
        gamma: share by which the radius shrinks or grows at each step.
        seed: of the random directions.
    """

    def __init__(self, steps: int = 100, *, init_epsilon: float = 1.0, gamma: float = 0.05,
                 seed: int = 0) -> None:
        check_positive(steps=steps, init_epsilon=init_epsilon, gamma=gamma)
        super().__init__(init_epsilon=init_epsilon, steps=steps, gamma=gamma)
        self.norm, self.seed = "l2", seed


class DeepFool(FoolboxBridge, fb.attacks.deepfool.DeepFoolAttack):
    """DeepFool in L2 or Linf (Moosavi-Dezfooli, Fawzi, Frossard 2016, arXiv:1511.04599).

    Args:
        norm: ``l2`` or ``linf``.
        steps: linearizations, at most.
        candidates: number of classes tried, the likeliest at the image.
        overshoot: step beyond the boundary, over the distance.
    """

    def __init__(self, norm: str = "l2", steps: int = 50, *, candidates: int = 10,
                 overshoot: float = 0.02) -> None:
        check_norm(norm)
        check_positive(steps=steps, overshoot=overshoot)
        if candidates < 2:
            raise SpecError(f"candidates={candidates} must be at least 2")
        super().__init__(steps=steps, candidates=candidates, overshoot=overshoot)
        self.norm = norm

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2

    @property
    def _geometry(self) -> Any:
        return fb.attacks.LinfDeepFoolAttack if self.norm == "linf" else fb.attacks.L2DeepFoolAttack

    def get_distances(self, losses: Any, grads: Any) -> Any:
        return self._geometry.get_distances(self, losses, grads)

    def get_perturbations(self, distances: Any, grads: Any) -> Any:
        return self._geometry.get_perturbations(self, distances, grads)
