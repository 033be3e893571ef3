"""Decision-based attacks, which see only the predicted class: HopSkipJump and Boundary.

They run image by image: Foolbox shares random draws and step lengths among the images of a batch.
"""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..core.errors import SpecError
from ..core.runtime import seeded
from .base import check_norm, fb
from .foolbox_bridge import FoolboxBridge, QueriesSpent, RecordedModel, check_positive
from .losses import ascend
from .noise import seed_of
from .pixel_model import PixelModel

# Queries in one forward pass.
_CHUNK = 128
# Random images tried as a start, and points tried between the image and one that fools the model.
_STARTS, _BLENDS = 1024, 50


class _OneByOne(FoolboxBridge):
    """Bridge that runs one image at a time, with its own random numbers and query limit."""

    steps: int

    @torch.no_grad()
    def _search(self, module: PixelModel, x: Tensor, labels: Tensor,
                bounds: tuple[float, float]) -> Tensor:
        done: dict[tuple[int, int], Tensor] = {}  # batches are padded with copies
        found = []
        for image, label in zip(x.unsqueeze(1), labels.unsqueeze(1), strict=True):
            key = seed_of(image, f"{self.seed} {type(self).__name__}"), int(label)
            if key not in done:
                recorded = RecordedModel(module, image, label, bounds, self.norm, self.steps)
                with seeded(key[0] % 2 ** 32):
                    self._run_one(recorded)
                done[key] = recorded.pixels
            found.append(done[key])
        return torch.cat(found)

    def _run_one(self, recorded: RecordedModel) -> None:
        """Run Foolbox's attack on one image, from a starting point found by us."""
        try:
            if not recorded.distance.isfinite() and _found_start(recorded):
                self._run_foolbox(recorded, starting_points=recorded.point.clone())
        except QueriesSpent:
            pass
        except (AssertionError, ValueError):
            # Foolbox raises these if a point no longer fools a model with random answers.
            if recorded.in_model:
                raise


def _found_start(recorded: RecordedModel) -> bool:
    """Find a starting point, which recorded keeps, and return whether there is one.

    Random images are tried first, then points between the image and one that fools the model.
    Every second chunk of them has random contrast: in noise of full contrast a model may see only
    one class.
    """
    image = recorded.unit
    for chunk in range(_STARTS // _CHUNK):
        noise = torch.rand((_CHUNK, *image.shape[1:]), device=image.device)
        if chunk % 2:
            noise *= torch.rand((_CHUNK, *[1] * (image.dim() - 1)), device=image.device)
        recorded(noise)
        if recorded.distance.isfinite():
            way = recorded.point - image
            for share in torch.linspace(0, 1, _BLENDS + 1).tolist()[1:]:
                if recorded.fooled(recorded(image + share * way)):
                    break
            return True
    return False


class HopSkipJump(_OneByOne, fb.attacks.HopSkipJumpAttack):
    """HopSkipJump in L2 or Linf (Chen, Jordan, Wainwright 2020, arXiv:1904.02144).

    Args:
        norm: ``l2`` or ``linf``.
        steps: queries for each image, at most.
        evaluations: queries of the first gradient estimate; they grow with the square root of the
            iteration.
        gamma: precision of the binary search.
        seed: of the start and the estimates.
    """

    def __init__(self, norm: str = "l2", steps: int = 5000, *, evaluations: int = 100,
                 gamma: float = 1.0, seed: int = 0) -> None:
        check_norm(norm)
        _check_steps(steps)
        check_positive(evaluations=evaluations, gamma=gamma)
        super().__init__(steps=steps, initial_gradient_eval_steps=evaluations,
                         max_gradient_eval_steps=steps, gamma=gamma, constraint=norm)
        self.norm, self.evaluations, self.seed = norm, evaluations, seed

    def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int,
                              delta: Any) -> Any:
        """Return the estimate of equation 16 at one image, with batched queries."""
        x: Tensor = x_advs.raw
        radius = max(float(delta.raw), 1e-12)
        total, plain, votes = torch.zeros_like(x), torch.zeros_like(x), 0.0
        for first in range(0, steps, _CHUNK):
            u = torch.empty((min(_CHUNK, steps - first), *x.shape[1:]), device=x.device)
            u = u.normal_() if self.norm == "l2" else u.uniform_(-1, 1)
            points = (x + radius * ascend(u, "l2")).clamp(0, 1)
            u = (points - x) / radius
            phi = is_adversarial(ep.astensor(points)).raw.to(u) * 2 - 1
            total += torch.tensordot(phi, u, 1)
            plain += u.sum(0)
            votes += float(phi.sum())
        mean = votes / steps
        return ep.astensor(ascend(total if abs(mean) == 1 else total - mean * plain, "l2"))


class Boundary(_OneByOne, fb.attacks.BoundaryAttack):
    """Boundary attack in L2 (Brendel, Rauber, Bethge 2018, arXiv:1712.04248).

    Queries are sequential: about 1 ms each on top of the model's own time.

    Args:
        steps: queries for each image, at most.
        spherical_step: first length of the step along the sphere, over the distance.
        source_step: first length of the step towards the image, over the distance.
        seed: of the start and the steps.
    """

    def __init__(self, steps: int = 5000, *, spherical_step: float = 0.01,
                 source_step: float = 0.01, seed: int = 0) -> None:
        _check_steps(steps)
        check_positive(spherical_step=spherical_step, source_step=source_step)
        super().__init__(steps=steps, spherical_step=spherical_step, source_step=source_step)
        self.norm, self.seed = "l2", seed


def _check_steps(steps: int) -> None:
    if steps < 2 * _CHUNK:
        raise SpecError(f"steps={steps} must be at least {2 * _CHUNK}",
                        why="They are queries, and the first ones look for a starting point.")
