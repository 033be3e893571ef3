"""Checks of a model: properties of its logits and gradients that mislead attacks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attacks import PGD, FoolboxModel, PixelModel
from ..attacks.base import fb
from ..attacks.losses import fools, input_gradient, margin, named, ruled_out, says_one
from ..attacks.noise import image_noise
from ..attacks.predictions import predict
from ..core.specs import Threat
from ..nn.contexts import soften

# Logits this far apart leave 1 - p under 1e-5, and cross-entropy's gradient has few digits left.
_SATURATED = 12.0
# The number of images on which random and batch-dependent forwards are looked for.
CHECKED_IMAGES = 64
# Steps of the attack without a bound on eps.
UNBOUNDED_STEPS = 20


def are_probabilities(logits: Tensor) -> bool:
    """Return whether the rows look like a softmax instead of logits."""
    return bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all())


def saturated(logits: Tensor, labels: Tensor) -> bool:
    """Return whether logits are too far apart on over 1 % of the correct images."""
    gaps = -margin(logits, labels)
    correct = gaps > 0
    return bool((gaps > _SATURATED).sum() > 0.01 * correct.sum())


def count_unsteady(model: PixelModel, pixels: Tensor, batch: int) -> tuple[int, int]:
    """Return how many images have random logits, and how many have logits that depend on the batch.

    Logits are the softened model's: where a sum is rounded differently, a quantizer may return
    another level.
    """
    x = pixels[:CHECKED_IMAGES]
    with soften(model, 2.0):
        once, twice, halved = (predict(model, x, size, attacked=True)
                               for size in (batch, batch, max(batch // 2, 1)))
    random = _differs(once, twice, 0.0)
    return int(random.sum()), int((_differs(once, halved, 1e-4) & ~random).sum())


def _differs(one: Tensor, two: Tensor, share: float) -> Tensor:
    """Return (N,) whether rows have another arg max, or differ by over a share of the largest."""
    no_class = ruled_out(one) & ruled_out(two)
    gap, size = (v.masked_fill(no_class, 0).abs().amax(1) for v in (one - two, one))
    return (named(one) != named(two)) | (gap > share * size)


def count_one_class_alone(model: PixelModel, pixels: Tensor, batch: int) -> int:
    """Return for how many images every class but one is ruled out."""
    return int(says_one(predict(model, pixels[:CHECKED_IMAGES], batch, attacked=True)).sum())


def count_zero_gradients(model: PixelModel, x: Tensor, y: Tensor, size: int, threat: Threat,
                         seed: int) -> int:
    """Return how many images have a zero input gradient, at the image and at a random point.

    Args:
        model: the attacked model.
        x: images, padded to a whole batch.
        y: their labels.
        size: how many of them count.
        threat: norm, eps and bounds.
        seed: of the random point.
    """
    start = x + threat.eps * image_noise(x, threat.norm, seed, "zero gradients")
    zero = torch.ones(size, dtype=torch.bool, device=x.device)
    for point in (x, start.clamp(*threat.bounds)):
        # the margin's, because a saturated softmax rounds cross-entropy's gradient to zero
        gradient = input_gradient(model, point, y, "margin")[0][:size]
        zero &= (gradient == 0).flatten(1).all(1)
    return int(zero.sum())


def count_unbounded_survivors(model: PixelModel, x: Tensor, y: Tensor, size: int, threat: Threat,
                              seed: int) -> int:
    """Return how many images survive an attack that may set every pixel to any value.

    Args: as :func:`count_zero_gradients`.
    """
    low, high = threat.bounds
    eps = (high - low) * (x[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    attack = PGD("margin", UNBOUNDED_STEPS, rel_step=0.25, decay=True, sharpness=(2, 16),
                 norm=threat.norm, seed=seed)
    found = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                       epsilon=eps)
    with torch.no_grad():
        return int((~fools(model(found), y))[:size].sum())
