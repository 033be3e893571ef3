"""What an attack climbs, which way is up, and the ball that it stays in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConversionError
from ..running import first_line, lacks_derivative, out_of_memory

# What ``scaled`` brings the top logit's distance from the mean to: far from rounding to 0 or 1.
_SPREAD = 3.0
# A class is ruled out where the top logit is so many times as far away as the top logit's own size,
# the next one's distance, or 1: logits as nets have them are not.
_RULED_OUT = 100.0
# What a margin is at least where a tie names the wrong class, and at most where none is named:
# differences of it must stay numbers.
_LEAST, _MOST = 1e-30, 1e9


class _Finite(torch.autograd.Function):
    """Put numbers in the place of infinities, which have the gradient that those would have."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, replaced: Tensor) -> Tensor:
        return replaced

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def decided(logits: Tensor) -> Tensor:
    """Return logits (N, classes) of which every row is finite, or NaN where it names no class.

    The arg max stays. Minus infinity (a class that is ruled out, the logarithm of no vote) becomes
    a number so far below the row's others that a softmax rounds it to 0, and a lone infinity one
    above them, so that no loss and no gradient of the others turns into NaN. A row with NaN, with
    several infinities, or with nothing but minus infinity names no class.
    """
    finite = logits.isfinite()
    if bool(finite.all()):
        return logits
    with torch.no_grad():
        z, some = logits.double(), finite.any(1, keepdim=True)
        high = z.masked_fill(~finite, -torch.inf).amax(1, keepdim=True).where(some, 0.0)
        low = z.masked_fill(~finite, torch.inf).amin(1, keepdim=True).where(some, 0.0)
        size = torch.maximum(high.abs(), low.abs())
        gap = _RULED_OUT * torch.maximum(high - low, size.clamp_min(_RULED_OUT))
        top = logits == torch.inf
        nothing = logits.isnan().any(1) | (top.sum(1) > 1) | (logits == -torch.inf).all(1)
        most = torch.finfo(logits.dtype).max
        replaced = torch.where(top, high + gap, low - gap).clamp(-most, most).to(logits.dtype)
        replaced = torch.where(finite, logits, replaced)
        replaced = replaced.masked_fill(nothing.unsqueeze(1), torch.nan)
    result: Tensor = _Finite.apply(logits, replaced)
    return result


def fools(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which rows (N,) name another class than labels, or none at all.

    The one judge of whether an image is broken. The arg max decides, whatever other classes have;
    a row of NaN would pass for class 0.
    """
    return named(logits) != labels


def named(logits: Tensor) -> Tensor:
    """Return the class (N,) that each row names; -1 where it names none."""
    z = decided(logits)
    return z.argmax(1).masked_fill(z.isnan().any(1), -1)


def margin(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Return ``max_{j != y} z_j - z_y`` for each row: positive where misclassified.

    With target, (N,) classes, ``z_target - z_y``. Infinite where a row is NaN, and names no class.
    """
    logits = decided(logits)
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if target is not None:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - own
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    gap = others.amax(1) - own
    return gap.masked_fill(gap.isnan(), torch.inf)


def height(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a finite margin (N,) that is above 0 exactly where a row fools, also among ties."""
    gap = margin(logits, labels)
    return torch.where(fools(logits, labels), gap.clamp(_LEAST, _MOST), gap.clamp_max(0))


def rival(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Return the class that comes rank-th, from 1, among the wrong ones; at most the last."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    order = others.argsort(dim=1, descending=True, stable=True)
    return order[:, min(rank, logits.shape[1] - 1) - 1]


def dlr(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio (N,), which no scale or shift of the logits changes.

    The margin, to the likeliest wrong class or to target, divided by what the sorted logits
    ``z_(1) >= z_(2) >= ...`` span (Croce, Hein 2020, arXiv:2003.01690, equations 6 and 7):
    ``z_(1) - z_(3)``, or with a target ``z_(1) - (z_(3) + z_(4)) / 2``. Three classes have no
    ``z_(4)``: with a target the mean is that of ``z_(2)`` and ``z_(3)``, since ``z_(1) - z_(3)``
    may be the margin itself. Of two classes nothing is left to divide by: the margin.
    """
    climbed = margin(logits, labels, target)
    count = min(logits.shape[1], 4)
    if count == 2:
        return climbed
    top = logits.topk(count, dim=1).values
    low = top[:, 2] if target is None else top[:, -2:].mean(1)
    return climbed / (top[:, 0] - low).clamp_min(1e-12)


def image_losses(logits: Tensor, labels: Tensor, loss: str,
                 target: Tensor | None = None) -> Tensor:
    """Return what the attacker climbs, (N,), one number an image.

    Args:
        logits: (N, classes).
        labels: (N,) true classes.
        loss: ``ce``; ``margin``, to the likeliest wrong class or to target; ``dlr``, see
            :func:`dlr`; or ``scaled``: the cross-entropy of logits divided by their own spread,
            held constant, which no scale of the last layer saturates (as in Gupta, Ajanthan 2022,
            arXiv:2003.13511).
        target: (N,) classes.
    """
    if loss in ("margin", "dlr"):
        return (margin if loss == "margin" else dlr)(logits, labels, target)
    if loss == "scaled":
        logits = logits / _spread(logits.detach()).clamp_min(1e-30) * _SPREAD
    return F.cross_entropy(logits, labels, reduction="none")


def ruled_out(logits: Tensor) -> Tensor:
    """Return which logits (N, classes) are so low that they stand for no class at all.

    Those that :func:`decided` replaced, and others' -1e4 or less.
    """
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    first, second = top[:, :1], top[:, -1:]
    size = torch.maximum(first - second, first.abs().clamp_min(1))
    far: Tensor = first - logits > _RULED_OUT * size
    return far


def says_one(logits: Tensor) -> Tensor:
    """Return which rows (N,) say only what the largest class is, of logits from :func:`decided`.

    All others are ruled out, or the largest was infinite: then no gradient leads to another.
    """
    order = logits.sort(dim=1, descending=True).values
    if order.shape[1] < 2:
        return torch.zeros_like(order[:, 0], dtype=torch.bool)
    first, second, last = order[:, 0], order[:, 1], order[:, -1]
    size = torch.maximum(second.abs(), last.abs()).clamp_min(_RULED_OUT)
    infinite = torch.isclose(first - second, _RULED_OUT * torch.maximum(second - last, size),
                             rtol=1e-4)
    alone: Tensor = (first - second > 0.99 * _RULED_OUT ** 2) & (second == last)
    return alone | infinite


def _spread(logits: Tensor) -> Tensor:
    """Return how far the top logit is from the mean of those not ruled out, (N, 1)."""
    far = ruled_out(logits)
    away = logits.amax(1, keepdim=True) - logits
    return away.masked_fill(far, 0).sum(1, keepdim=True) / (~far).sum(1, keepdim=True)


def attack_loss(logits: Tensor, labels: Tensor, loss: str, target: Tensor | None = None) -> Tensor:
    """Return the sum over images of :func:`image_losses`."""
    return image_losses(logits, labels, loss, target).sum()


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
    """Return the gradient of the loss in the images, and the logits.

    Raises:
        ConversionError: as :func:`gradient_in`.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        gradient = gradient_in(leaf, attack_loss(logits, labels, loss, target), model)
    return gradient, logits.detach()


def gradient_in(leaf: Tensor, output: Tensor, model: nn.Module,
                weights: Tensor | None = None) -> Tensor:
    """Return the gradient in leaf of what a model made of it, and what was made of that.

    Zeros where the model goes through an operation that has no derivative in torch.

    Args:
        output: a number, or with weights of its shape anything.
        model: is told where there is no derivative, if it is a :class:`PixelModel`.

    Raises:
        ConversionError: torch cannot compute the gradient for another reason.
    """
    try:
        (gradient,) = torch.autograd.grad(output, leaf, weights, retain_graph=weights is not None)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        if not lacks_derivative(error):
            raise ConversionError("the model's gradient in its images cannot be computed",
                                  why=f"torch says: {first_line(error)}",
                                  fix="It must be one that loss.backward() can compute.",
                                  ) from error
        tell = getattr(model, "has_no_gradient", None)
        if tell is not None:
            tell(error)
        return torch.zeros_like(leaf)
    return gradient
