"""Projected gradient descent through quantizers, by surrogate gradients or a softened model.

Madry et al. 2018, arXiv:1706.06083; margin loss as in Carlini & Wagner 2017, arXiv:1608.04644.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SpecError
from ..nn.contexts import at_bits
from .gradient_attack import BestFound, GradientAttack
from .losses import ascend, input_gradient, project
from .noise import image_noise
from .pixel_model import PixelModel


class PGD(GradientAttack):
    """PGD whose iterates are judged by the original model; the first adversarial one is returned.

    With ``sharpness=(k_0, k_1)`` the gradient at step s of S comes from the softened model of
    sharpness ``k_0 (k_1 / k_0)^(s / (S - 1))``; otherwise from the surrogate ``mode``. On a model
    without quantizers both are plain PGD.

    Args:
        loss: ``ce``, ``margin`` or ``scaled``, see :func:`quantguard.attacks.losses.image_losses`.
        steps: gradient steps.
        rel_step: first step's length over eps; None: 2.5 / steps.
        decay: whether steps shrink linearly to 0.
        mode: backward mode of the quantizers.
        sharpness: sharpness of the softened model at the first and last step; None: surrogate
            gradients instead of the softened model.
        bits: take gradients of the same weights with quantizers of this many bits, or without any
            for 32: a transfer attack.
        norm: ``linf`` or ``l2``.
        noise: radius of the random start over eps, 0 to 1.
        target: with ``margin``: rank, from 1, among the wrong classes at the image of the class to
            attack towards; 0: the wrong class with the largest logit at each step.
        average: gradients averaged at each step, over N(0, (eps / 4)^2) around the iterate.
        restart: start around ``starting_points`` where they are passed, instead of the image.
        bpda: for the gradient, apply max-pools before quantizers, and differentiate through other
            non-differentiable operations; see :func:`quantguard.nn.pool_reordering.pools_first`
            and :func:`quantguard.attacks.bpda.straight_through`.
        by_image: whether softened thresholds have a window width for each image: see
            :func:`quantguard.soften`. Some models are broken by these, others by the gaps' widths.
        seed: of the start and the averaging.

    Raises:
        SpecError: an unknown loss, or numbers out of range.
    """

    losses = ("ce", "margin", "scaled")

    def __init__(self, loss: str = "ce", steps: int = 40, *, rel_step: float | None = None,
                 decay: bool = False, mode: str = "ramp",
                 sharpness: tuple[float, float] | None = None, bits: int | None = None,
                 norm: str = "linf", noise: float = 1.0, target: int = 0, average: int = 1,
                 restart: bool = False, bpda: bool = True, by_image: bool = False,
                 seed: int = 0) -> None:
        super().__init__(loss, steps, mode=mode, sharpness=sharpness, norm=norm, noise=noise,
                         target=target, restart=restart, bpda=bpda, by_image=by_image, seed=seed)
        if average < 1:
            raise SpecError(f"average={average} must be at least 1")
        self.rel_step = 2.5 / steps if rel_step is None else rel_step
        self.decay, self.bits, self.average = decay, bits, average

    def _tag(self) -> str:
        return f"pgd {self.loss} {self.mode} {self.sharpness} {self.bits}"

    def _maximise(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
                  target: Tensor | None, eps: float, bounds: tuple[float, float]) -> BestFound:
        found = BestFound(x, labels)
        for step in range(self.steps + 1):
            last = step == self.steps
            gradient = logits = None
            if not last:
                gradient, logits = self._gradient(module, x, labels, target, step, eps)
            if logits is None:
                with torch.no_grad():
                    logits = module(x)
            found.judge(x, logits)
            if last or gradient is None or bool(found.already_fooled.all()):
                break
            rows = found.survivors()
            if rows is not None:
                x, x0, gradient, labels = x[rows], x0[rows], gradient[rows], labels[rows]
                target = None if target is None else target[rows]
            shrink = 1 - step / self.steps if self.decay else 1.0
            x = x + shrink * self.rel_step * eps * ascend(gradient, self.norm)
            x = project(x, x0, eps, self.norm, bounds)
        return found

    def _judges_itself(self, module: PixelModel) -> bool:
        return self.bits is None and super()._judges_itself(module)

    def _quantizer_context(self, module: PixelModel,
                           progress: float) -> AbstractContextManager[Any]:
        if self.bits is not None:
            return at_bits(module, self.bits)
        return super()._quantizer_context(module, progress)

    def _gradient(self, module: PixelModel, x: Tensor, labels: Tensor, target: Tensor | None,
                  step: int, eps: float) -> tuple[Tensor, Tensor | None]:
        """Return the gradient at x, and the original model's logits if they come along."""
        with self._surrogate(module, step / max(self.steps - 1, 1)):
            if self.average == 1:
                gradient, logits = input_gradient(module, x, labels, self.loss, target)
                return gradient, logits if self._judges_itself(module) else None
            total = torch.zeros_like(x)
            for number in range(self.average):
                unit = image_noise(x, "normal", self.seed, f"{self._tag()} {step} {number}")
                near = x + eps / 4 * unit
                gradient = input_gradient(module, near, labels, self.loss, target)[0]
                # Normalised: the small gradient of a saturated point is as informative.
                total += gradient / gradient.flatten(1).abs().mean(1).clamp_min(1e-30).reshape(
                    -1, *[1] * (x.dim() - 1))
        return total, None
