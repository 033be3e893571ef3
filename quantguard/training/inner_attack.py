"""The inner attack of adversarial training: a few gradient steps on the images of a batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.losses import ascend, project
from ..core.module_utils import evaluating, frozen
from ..core.specs import Threat
from ..nn.contexts import soften
from ..nn.conv_input_grad import takes_few_channels
from ..nn.pool_reordering import pools_first
from .recipes import Recipe

# Layers whose weights autocast casts.
_CAST = (nn.Linear, nn.modules.conv._ConvNd)


def attacked_images(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    threat: Threat,
    recipe: Recipe,
    noise: Tensor | None = None,
    low: bool = False,
) -> Tensor:
    """Return the attacked images of a batch, or pixels if the recipe does not attack.

    During the attack BatchNorm is in eval mode, and no parameter gets a gradient.

    Args:
        noise: the random start, (N, ...) from -1 to 1, or in the unit ball of L2; None: from
            torch's global generator.
        low: whether the network runs in bfloat16.
    """
    if not recipe.attacks:
        return pixels
    rel_step, steps = recipe.rel_step or 0.0, recipe.steps or 0
    start = random_start(pixels, threat.norm) if noise is None else noise
    x = (pixels + (recipe.noise or 0.0) * threat.eps * start).clamp(*threat.bounds)
    # autocast caches the cast of a weight over all steps only if the weight requires a gradient
    cast = [p for m in model.modules() if isinstance(m, _CAST) and not takes_few_channels(m.weight)
            for p in m.parameters(recurse=False)]
    with evaluating(model), frozen(model, but=cast if low else ()), pools_first(model), \
            torch.autocast(pixels.device.type, torch.bfloat16, enabled=low):
        answers = None
        if recipe.beta:
            with torch.no_grad():
                answers = answers_of(model, pixels, False).softmax(1)
        for step in range(steps):
            softened: Any = nullcontext()
            if recipe.sharpness:
                softened = soften(model, recipe.sharpness[min(step, len(recipe.sharpness) - 1)])
            with softened:
                gradient = _gradient(model, x, labels, answers, low)
            x = x + rel_step * threat.eps * ascend(gradient, threat.norm)
            if recipe.name == "nfgsm":
                # projecting would undo the noise that prevents catastrophic overfitting
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
    """Return the logits in the type of x; ``low``: computed in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        logits: Tensor = model(x)
    return logits.to(x.dtype)


def _gradient(model: nn.Module, x: Tensor, labels: Tensor, answers: Tensor | None,
              low: bool) -> Tensor:
    """Return the gradient in the images of the loss that the attack maximises.

    Args:
        answers: probabilities on the clean images: maximise the divergence from these (TRADES);
            None: maximise the cross-entropy.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = answers_of(model, leaf, low)
        if answers is None:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        else:
            loss = F.kl_div(logits.log_softmax(1), answers, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
