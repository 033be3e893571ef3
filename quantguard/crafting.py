"""What training climbs and what it descends: inner attacks, losses, perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import staircases
from .attacks import PixelModel
from .attacks.losses import ascend, project
from .contexts import listening, soften
from .fewchannels import eats_few_channels
from .nearness import nearness
from .pooling import pools_first
from .recipes import Recipe
from .running import evaluating, frozen
from .spec import Threat

# Layers whose weights autocast casts.
_CAST = (nn.Linear, nn.modules.conv._ConvNd)


def craft(model: nn.Module, pixels: Tensor, labels: Tensor, threat: Threat, recipe: Recipe,
          noise: Tensor | None = None, low: bool = False) -> Tensor:
    """Return the training images of a batch: attacked ones, or pixels themselves.

    BatchNorm is in eval mode and no parameter gets a gradient while crafting.

    Args:
        noise: the random start, (N, ...) from -1 to 1, or in the unit ball of L2; None: from
            torch's global generator.
        low: whether to climb in bfloat16.
    """
    if not recipe.attacks:
        return pixels
    rel_step, steps = recipe.rel_step or 0.0, recipe.steps or 0
    start = random_start(pixels, threat.norm) if noise is None else noise
    x = (pixels + (recipe.noise or 0.0) * threat.eps * start).clamp(*threat.bounds)
    # autocast casts a weight once, for all steps, if it may get a gradient; none is asked for
    cast = [p for m in model.modules() if isinstance(m, _CAST) and not eats_few_channels(m.weight)
            for p in m.parameters(recurse=False)]
    with evaluating(model), frozen(model, but=cast if low else ()), pools_first(model), \
            torch.autocast(pixels.device.type, torch.bfloat16, enabled=low):
        answers = None
        if recipe.beta:
            with torch.no_grad():
                answers = answers_of(model, pixels, False).softmax(1)
        for step in range(steps):
            twin: Any = nullcontext()
            if recipe.sharpness:
                twin = soften(model, recipe.sharpness[min(step, len(recipe.sharpness) - 1)])
            with twin:
                gradient = _gradient(model, x, labels, answers, low)
            x = x + rel_step * threat.eps * ascend(gradient, threat.norm)
            if recipe.name == "nfgsm":
                # projecting would undo the noise that keeps one-step training from collapsing
                x = x.clamp(*threat.bounds)
            else:
                x = project(x, pixels, threat.eps, threat.norm, threat.bounds)
    return x.detach()


def random_start(pixels: Tensor, norm: str) -> Tensor:
    """Return a random point of the unit ball for each image, from torch's global generator."""
    if norm == "linf":
        return torch.empty_like(pixels).uniform_(-1, 1)
    return ascend(torch.randn_like(pixels), "l2") * torch.rand(
        (len(pixels), *[1] * (pixels.dim() - 1)), device=pixels.device)


def answers_of(model: nn.Module, x: Tensor, low: bool) -> Tensor:
    """Return the logits of x in its own dtype; ``low``: computed in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        logits: Tensor = model(x)
    return logits.to(x.dtype)


def _gradient(model: nn.Module, x: Tensor, labels: Tensor, answers: Tensor | None,
              low: bool) -> Tensor:
    """Return the gradient in the images of what the inner attack climbs."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = answers_of(model, leaf, low)
        height = F.cross_entropy(logits, labels, reduction="sum") if answers is None else \
            F.kl_div(logits.log_softmax(1), answers, reduction="sum")
        (gradient,) = torch.autograd.grad(height, leaf)
    return gradient


class Objective:
    """Compute the training loss of a batch: attacked images, the model as it is.

    Args:
        model: what is trained.
        threat, recipe: the attacker, and what the loss is made of.
        low: whether the network runs in bfloat16.
        teacher: the float parent's logits of clean pixels; needed where the recipe distills.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe, low: bool = False,
                 teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.threat, self.recipe, self.teacher = model, threat, recipe, teacher
        self.low = low

    def at(self, progress: float) -> None:
        """Do nothing: the loss is the same from the first step to the last."""

    @property
    def attacker(self) -> Threat:
        """Return what the inner attack may do."""
        return self.threat

    def __call__(self, x: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images.

        Args:
            x: the attacked images (N, ...), see :func:`craft`.
            pixels: the clean ones.
            labels: (N,); -1 where there is none.
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
    """Return the loss summed over images with a label, over the number of all."""
    return loss(logits, labels.clamp_min(0), reduction="none")[known].sum() / len(labels)


@contextmanager
def perturbed(model: nn.Module, share: float, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Move weights against the loss by ``share`` of their own norm, inside the context.

    Wu et al. 2020, arXiv:2004.05884, equations 8 to 10, one step; layer by layer, of matrices and
    filters alone. The gradient that is taken inside belongs to the weights outside.

    Args:
        loss: computes the loss; called once, in eval mode, so that no statistics move.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    if not share or not weights:
        yield
        return
    with evaluating(model):
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    length = share * weight.norm() / gradient.norm().clamp_min(1e-12)
                    weight.add_(length * gradient)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


@contextmanager
def stability_term(model: nn.Module, weight: float) -> Iterator[Callable[[], Tensor | float]]:
    """Collect how near the thresholds pre-activations are, during a forward inside the context.

    The mean of :func:`nearness` over sites: a pre-activation off every threshold does not change
    its level when the image moves a little.
    """
    terms: list[Tensor] = []
    modules = staircases(model)

    def listener(name: str) -> Callable[[Tensor], None]:
        module = modules[name]

        def listen(z: Tensor) -> None:
            terms.append(nearness(z, module.thresholds, module.step, module.axis))
        return listen

    if not weight or not modules:
        yield lambda: 0.0
        return
    with listening(model, {name: listener(name) for name in modules}):
        yield lambda: weight * torch.stack(terms).mean() if terms else 0.0
