"""Projected gradient descent through a staircase: surrogate gradients, or the softened twin.

Madry et al. 2018, arXiv:1706.06083; margin loss as in Carlini & Wagner 2017, arXiv:1608.04644.
"""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import backward, bypass, soften
from ..errors import SpecError
from ..running import frozen
from ._foolbox import fb
from .bridge import PixelModel, module_of
from .noise import image_noise

LOSSES = ("ce", "margin")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``max_{j != y} z_j - z_y`` for each row: positive where misclassified."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.amax(1) - own


def attack_loss(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Return the sum over images of what the attacker climbs."""
    if loss == "ce":
        return F.cross_entropy(logits, labels, reduction="sum")
    return margin(logits, labels).sum()


def project(x: Tensor, center: Tensor, eps: float, norm: str,
            bounds: tuple[float, float]) -> Tensor:
    """Return the point of the eps ball around center, within bounds, next to x.

    In L2 the ball is projected on first and the bounds clipped after, which only shortens.
    """
    delta = x - center
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = delta * (eps / length).clamp_max(1).reshape(-1, *[1] * (x.dim() - 1))
    inside: Tensor = (center + delta).clamp(*bounds)
    return inside


def ascend(gradient: Tensor, norm: str) -> Tensor:
    """Return the steepest direction of unit length."""
    if norm == "linf":
        return gradient.sign()
    # by the largest entry first: squares of a saturated network's gradient underflow
    shape = (-1, *[1] * (gradient.dim() - 1))
    peak = gradient.flatten(1).abs().amax(1).reshape(shape)
    scaled = gradient / torch.where(peak > 0, peak, 1.0)
    length: Tensor = scaled.flatten(1).norm(dim=1).clamp_min(1e-12)
    return scaled / length.reshape(shape)


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss in the images, and the logits."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(attack_loss(logits, labels, loss), leaf)
    return gradient, logits.detach()


class PGD(fb.attacks.base.FixedEpsilonAttack):
    """PGD with every iterate judged by the model as it is; an image that fell is kept as it fell.

    With ``twin=(k_0, k_1)`` the gradient at step s of S comes from the softened twin of sharpness
    ``k_0 (k_1 / k_0)^(s / (S - 1))``; otherwise from the surrogate ``mode``. On a model without
    staircases both are plain PGD.

    Args:
        loss: ``ce`` or ``margin``.
        steps: gradient steps.
        rel_step: first step's length over eps; None: 2.5 / steps.
        decay: whether steps shrink linearly to 0.
        mode: backward mode of the staircases.
        twin: sharpness at the first and last step; None: no twin.
        parent: climb the model under ``bypass`` instead, a transfer from the float parent.
        norm: ``linf`` or ``l2``.
        random_start: from a random point of the ball instead of the image.
        seed: of the start.

    Raises:
        SpecError: an unknown loss, or no steps.
    """

    def __init__(self, loss: str = "ce", steps: int = 40, *, rel_step: float | None = None,
                 decay: bool = False, mode: str = "ramp",
                 twin: tuple[float, float] | None = None, parent: bool = False,
                 norm: str = "linf", random_start: bool = True, seed: int = 0) -> None:
        if loss not in LOSSES:
            raise SpecError(f"loss {loss!r} is unknown", fix=f"Use one of {', '.join(LOSSES)}.")
        if steps < 1:
            raise SpecError(f"steps={steps} must be at least 1")
        self.loss, self.steps, self.mode, self.twin, self.parent = loss, steps, mode, twin, parent
        self.rel_step = 2.5 / steps if rel_step is None else rel_step
        self.decay, self.norm, self.random_start, self.seed = decay, norm, random_start, seed

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first iterate that fools model, else the last."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        wanted = fb.attacks.base.get_criterion(criterion)
        if not isinstance(wanted, fb.criteria.Misclassification):
            raise SpecError(f"this attack is untargeted, and {type(wanted).__name__} is not",
                            fix="Give labels, or foolbox.criteria.Misclassification.")
        labels = wanted.labels.raw
        x0: Tensor = wrapped.raw
        result = restore(ep.astensor(self._climb(model, x0, labels, epsilon)))
        return result

    def _climb(self, model: Any, x0: Tensor, labels: Tensor, eps: float) -> Tensor:
        module, bounds = module_of(model), model.bounds
        x = x0
        if self.random_start:
            tag = f"pgd {self.loss} {self.mode} {self.twin} {self.parent}"
            x = project(x0 + eps * image_noise(x0, self.norm, self.seed, tag), x0, eps, self.norm,
                        bounds)
        kept = x.clone()
        fallen = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        with frozen(module):
            for step in range(self.steps + 1):
                last = step == self.steps
                gradient = logits = None
                if not last:
                    gradient, logits = self._gradient(module, x, labels, step)
                if logits is None:
                    with torch.no_grad():
                        logits = module(x)
                new = (logits.argmax(1) != labels) & ~fallen
                kept[new] = x[new]
                fallen |= new
                if last or gradient is None or bool(fallen.all()):
                    break
                share = 1 - step / self.steps if self.decay else 1.0
                x = x + share * self.rel_step * eps * ascend(gradient, self.norm)
                x = project(x, x0, eps, self.norm, bounds)
        kept[~fallen] = x[~fallen]
        return kept

    def _gradient(self, module: PixelModel, x: Tensor, labels: Tensor,
                  step: int) -> tuple[Tensor, Tensor | None]:
        """Return the gradient, and the logits where they are those of the hard model."""
        if self.parent:
            with bypass(module):
                return input_gradient(module, x, labels, self.loss)[0], None
        if self.twin is not None and module.quantized:
            low, high = self.twin
            k = low * (high / low) ** (step / max(self.steps - 1, 1))
            with soften(module, k):
                return input_gradient(module, x, labels, self.loss)[0], None
        with backward(module, self.mode):
            return input_gradient(module, x, labels, self.loss)
