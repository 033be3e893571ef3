"""The training loss of attacked images, and what goes into it: TRADES, stability, AWP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import PixelModel
from ..core.module_utils import evaluating
from ..core.specs import Threat
from ..nn.contexts import listening
from ..nn.pool_reordering import pools_first
from ..nn.quant_activation import quantizers
from ..nn.threshold_margin import threshold_margin
from .inner_attack import answers_of
from .recipes import Recipe


class Objective:
    """The training loss of a batch of attacked images.

    Args:
        model: the model that is trained.
        threat, recipe: the attacker, and the terms of the loss.
        low: whether the network runs in bfloat16.
        teacher: the float parent's logits of clean pixels; needed if the recipe distills.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe, low: bool = False,
                 teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.threat, self.recipe, self.teacher = model, threat, recipe, teacher
        self.low = low

    def at(self, progress: float) -> None:
        """Do nothing: this loss is the same at every step."""

    @property
    def attacker(self) -> Threat:
        """The threat of the inner attack."""
        return self.threat

    def __call__(self, x: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images.

        Args:
            x: the attacked images (N, ...), see :func:`.inner_attack.attacked_images`.
            pixels: the clean images.
            labels: (N,); -1 for an image without a label.
        """
        recipe, known = self.recipe, labels >= 0
        with stability_term(self.model.model, recipe.stability or 0.0) as term, \
                pools_first(self.model):
            logits = answers_of(self.model, x, self.low)
            loss = term()
            clean = answers_of(self.model, pixels, self.low) if recipe.mix or recipe.beta \
                else logits
        if recipe.beta:
            away = F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none",
                            log_target=True).sum(1)
            value = _mean(F.cross_entropy, clean, labels, known) + recipe.beta * away.mean()
        else:
            value = (1 - recipe.mix) * _mean(F.cross_entropy, logits, labels, known)
            if recipe.mix:
                value = value + recipe.mix * _mean(F.cross_entropy, clean, labels, known)
        if recipe.distill and self.teacher is not None:
            away = F.kl_div(logits.log_softmax(1), self.teacher(pixels).log_softmax(1),
                            reduction="none", log_target=True).sum(1)
            value = (1 - recipe.distill) * value + recipe.distill * away.mean()
        return value + loss


def _mean(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Return the sum of the loss over labelled images, over the number of all images."""
    return loss(logits, labels.clamp_min(0), reduction="none")[known].sum() / len(labels)


@contextmanager
def perturbed(model: nn.Module, share: float, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Move the weights against the loss by ``share`` of their norm, inside the context.

    Adversarial weight perturbation (Wu et al. 2020, arXiv:2004.05884, equations 8 to 10) with one
    step, layer by layer, of matrices and filters only. A gradient that is computed inside the
    context is applied to the original weights.

    Args:
        loss: computes the loss; called once, in eval mode, so that no statistics change.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    if not share or not weights:
        yield
        return
    with evaluating(model):
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    originals = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    length = share * weight.norm() / gradient.norm().clamp_min(1e-12)
                    weight.add_(length * gradient)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, originals, strict=True):
                weight.copy_(value)


@contextmanager
def stability_term(model: nn.Module, weight: float) -> Iterator[Callable[[], Tensor | float]]:
    """Collect how close pre-activations are to the thresholds, in a forward inside the context.

    The term is the mean of :func:`threshold_margin` over sites. The level of a pre-activation far
    from every threshold does not change if the image moves a little.
    """
    terms: list[Tensor] = []
    modules = quantizers(model)

    def listener(name: str) -> Callable[[Tensor], None]:
        module = modules[name]

        def listen(z: Tensor) -> None:
            terms.append(threshold_margin(z, module.thresholds, module.step, module.axis))
        return listen

    if not weight or not modules:
        yield lambda: 0.0
        return
    with listening(model, {name: listener(name) for name in modules}):
        yield lambda: weight * torch.stack(terms).mean() if terms else 0.0
