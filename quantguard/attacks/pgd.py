"""Projected gradient descent through a staircase: surrogate gradients, or the softened twin.

Madry et al. 2018, arXiv:1706.06083; margin loss as in Carlini & Wagner 2017, arXiv:1608.04644.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import eagerpy as ep
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import backward, bypass, soften
from ..errors import SpecError
from ..pooling import pools_first
from ..running import frozen
from ._foolbox import fb
from .bridge import PixelModel, labels_of, module_of
from .noise import image_noise

LOSSES = ("ce", "margin", "scaled")
# What ``scaled`` brings the top logit's distance from the mean to: far from rounding to 0 or 1.
_SPREAD = 3.0


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``max_{j != y} z_j - z_y`` for each row: positive where misclassified."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.amax(1) - own


def rival(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Return the class that comes rank-th, from 1, among the wrong ones; at most the last."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    order = others.argsort(dim=1, descending=True, stable=True)
    return order[:, min(rank, logits.shape[1] - 1) - 1]


def attack_loss(logits: Tensor, labels: Tensor, loss: str, target: Tensor | None = None) -> Tensor:
    """Return the sum over images of what the attacker climbs.

    Args:
        logits: (N, classes).
        labels: (N,) true classes.
        loss: ``ce``; ``margin``, to the likeliest wrong class or to target; or ``scaled``: the
            cross-entropy of logits divided by their own spread, held constant, which no scale of
            the last layer saturates (as in Gupta, Ajanthan 2022, arXiv:2003.13511).
        target: (N,) classes.
    """
    if loss == "margin":
        if target is None:
            return margin(logits, labels).sum()
        own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        return (logits.gather(1, target.unsqueeze(1)).squeeze(1) - own).sum()
    if loss == "scaled":
        spread = (logits.amax(1, keepdim=True) - logits.mean(1, keepdim=True)).detach()
        logits = logits / spread.clamp_min(1e-30) * _SPREAD
    return F.cross_entropy(logits, labels, reduction="sum")


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


def input_gradient(model: nn.Module, x: Tensor, labels: Tensor, loss: str,
                   target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss in the images, and the logits."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(attack_loss(logits, labels, loss, target), leaf)
    return gradient, logits.detach()


class PGD(fb.attacks.base.FixedEpsilonAttack):
    """PGD with every iterate judged by the model as it is; an image that fell is kept as it fell.

    With ``twin=(k_0, k_1)`` the gradient at step s of S comes from the softened twin of sharpness
    ``k_0 (k_1 / k_0)^(s / (S - 1))``; otherwise from the surrogate ``mode``. On a model without
    staircases both are plain PGD.

    Args:
        loss: ``ce``, ``margin`` or ``scaled``, see :func:`attack_loss`.
        steps: gradient steps.
        rel_step: first step's length over eps; None: 2.5 / steps.
        decay: whether steps shrink linearly to 0.
        mode: backward mode of the staircases.
        twin: sharpness at the first and last step; None: no twin.
        parent: climb the model under ``bypass`` instead, a transfer from the float parent.
        norm: ``linf`` or ``l2``.
        noise: radius of the random start over eps, 0 to 1.
        target: with ``margin``: climb towards the class that comes so-and-so many-th, from 1,
            among the wrong ones at the image; 0: towards whichever is nearest.
        average: gradients averaged at each step, over N(0, (eps / 4)^2) around the iterate.
        restart: start around ``starting_points`` where they are given, instead of the image.
        pools_first: max-pool before a staircase instead of after it while climbing, see
            :func:`quantguard.pooling.pools_first`.
        seed: of the start and the averaging.

    Raises:
        SpecError: an unknown loss, or numbers out of range.
    """

    def __init__(self, loss: str = "ce", steps: int = 40, *, rel_step: float | None = None,
                 decay: bool = False, mode: str = "ramp",
                 twin: tuple[float, float] | None = None, parent: bool = False,
                 norm: str = "linf", noise: float = 1.0, target: int = 0, average: int = 1,
                 restart: bool = False, pools_first: bool = True, seed: int = 0) -> None:
        if loss not in LOSSES:
            raise SpecError(f"loss {loss!r} is unknown", fix=f"Use one of {', '.join(LOSSES)}.")
        if steps < 1 or average < 1:
            raise SpecError(f"steps={steps} and average={average} must be at least 1")
        if target and loss != "margin":
            raise SpecError(f"target={target} goes with loss='margin', not {loss!r}")
        if not 0 <= noise <= 1:
            raise SpecError(f"noise={noise} must be from 0 to 1")
        self.loss, self.steps, self.mode, self.twin, self.parent = loss, steps, mode, twin, parent
        self.rel_step = 2.5 / steps if rel_step is None else rel_step
        self.decay, self.norm, self.noise, self.seed = decay, norm, noise, seed
        self.target, self.average, self.restart = target, average, restart
        self.pools_first = pools_first

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            starting_points: Any = None, **kwargs: Any) -> Any:
        """Return for each image the first iterate that fools model, else the strongest.

        The strongest is the one with the largest margin of the model as it is.
        """
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        labels, x0 = labels_of(criterion), wrapped.raw
        around = x0
        if self.restart and starting_points is not None:
            around = ep.astensor(starting_points).raw
        return restore(ep.astensor(self._climb(model, x0, around, labels, epsilon)))

    def _climb(self, model: Any, x0: Tensor, around: Tensor, labels: Tensor, eps: float) -> Tensor:
        module, bounds = module_of(model), model.bounds
        x = project(around, x0, eps, self.norm, bounds)
        if self.noise:
            unit = image_noise(x0, self.norm, self.seed, self._tag())
            x = project(x + self.noise * eps * unit, x0, eps, self.norm, bounds)
        target = None
        if self.target:
            with torch.no_grad():
                target = rival(module(x0), labels, self.target)
        kept = x.clone()
        highest = torch.full(x0.shape[:1], -torch.inf, device=x0.device)
        fallen = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        with frozen(module):
            for step in range(self.steps + 1):
                last = step == self.steps
                gradient = logits = None
                if not last:
                    gradient, logits = self._gradient(module, x, labels, target, step, eps)
                if logits is None:
                    with torch.no_grad():
                        logits = module(x)
                height = margin(logits, labels)
                new = ~fallen & ((height > highest) | (logits.argmax(1) != labels))
                kept[new], highest[new] = x[new], height[new]
                fallen |= logits.argmax(1) != labels
                if last or gradient is None or bool(fallen.all()):
                    break
                share = 1 - step / self.steps if self.decay else 1.0
                x = x + share * self.rel_step * eps * ascend(gradient, self.norm)
                x = project(x, x0, eps, self.norm, bounds)
        return kept

    def _tag(self) -> str:
        return f"pgd {self.loss} {self.mode} {self.twin} {self.parent}"

    def _gradient(self, module: PixelModel, x: Tensor, labels: Tensor, target: Tensor | None,
                  step: int, eps: float) -> tuple[Tensor, Tensor | None]:
        """Return the gradient, and the logits where they are those of the hard model at x."""
        soft: Any = backward(module, self.mode)
        hard = not self.parent and (self.twin is None or not module.quantized)
        if self.parent:
            soft = bypass(module)
        elif self.twin is not None and module.quantized:
            low, high = self.twin
            soft = soften(module, low * (high / low) ** (step / max(self.steps - 1, 1)))
        with soft, pools_first(module) if self.pools_first else nullcontext():
            if self.average == 1:
                gradient, logits = input_gradient(module, x, labels, self.loss, target)
                return gradient, logits if hard else None
            total = torch.zeros_like(x)
            for number in range(self.average):
                unit = image_noise(x, "normal", self.seed, f"{self._tag()} {step} {number}")
                near = x + eps / 4 * unit
                gradient = input_gradient(module, near, labels, self.loss, target)[0]
                # each counts alike: a saturated point's gradient is small, not less telling
                total += gradient / gradient.flatten(1).abs().mean(1).clamp_min(1e-30).reshape(
                    -1, *[1] * (x.dim() - 1))
        return total, None
