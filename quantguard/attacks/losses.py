"""Losses of attacks, their gradients, steepest ascent and projection; who is fooled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConversionError
from ..core.model_calls import first_line, lacks_derivative, out_of_memory

# Distance of the top logit from the mean after ``scaled``: softmax does not round to 0 or 1.
_SPREAD = 3.0
# A class is ruled out if the top logit exceeds it by this many times the largest of the top logit's
# own size, its lead over the second logit, and 1. Ordinary logits never differ by that much.
_RULED_OUT = 100.0
# Smallest margin where a tie is decided for the wrong class, and largest where no class is
# predicted: differences of margins must stay finite.
_LEAST, _MOST = 1e-30, 1e9


class _Finite(torch.autograd.Function):
    """Replace infinities by numbers; the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, replaced: Tensor) -> Tensor:
        return replaced

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def decided(logits: Tensor) -> Tensor:
    """Return logits (N, classes) whose rows are finite, or all NaN if they predict no class.

    The arg max does not change. Minus infinity (a class that is ruled out, the logarithm of zero
    votes) becomes a number so far below the others that a softmax rounds it to 0, and a single
    infinity a number as far above them, so that losses and gradients are not NaN. A row predicts
    no class if it contains NaN, several infinities, or only minus infinity.
    """
    finite = logits.isfinite()
    if bool(finite.all()):
        return logits
    with torch.no_grad():
        z, any_finite = logits.double(), finite.any(1, keepdim=True)
        high = z.masked_fill(~finite, -torch.inf).amax(1, keepdim=True).where(any_finite, 0.0)
        low = z.masked_fill(~finite, torch.inf).amin(1, keepdim=True).where(any_finite, 0.0)
        size = torch.maximum(high.abs(), low.abs())
        gap = _RULED_OUT * torch.maximum(high - low, size.clamp_min(_RULED_OUT))
        top = logits == torch.inf
        no_class = logits.isnan().any(1) | (top.sum(1) > 1) | (logits == -torch.inf).all(1)
        most = torch.finfo(logits.dtype).max
        replaced = torch.where(top, high + gap, low - gap).clamp(-most, most).to(logits.dtype)
        replaced = torch.where(finite, logits, replaced)
        replaced = replaced.masked_fill(no_class.unsqueeze(1), torch.nan)
    result: Tensor = _Finite.apply(logits, replaced)
    return result


def fools(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which rows (N,) predict another class than labels, or no class.

    Every decision about whether an image is broken is made here. Only the arg max counts; rows
    of NaN are broken, too, although arg max takes them for class 0.
    """
    return named(logits) != labels


def named(logits: Tensor) -> Tensor:
    """Return the class (N,) that each row predicts, or -1 for no class."""
    z = decided(logits)
    return z.argmax(1).masked_fill(z.isnan().any(1), -1)


def margin(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Return ``max_{j != y} z_j - z_y`` for each row: positive where misclassified.

    With target, (N,) classes, it is ``z_target - z_y``. Infinite where a row predicts no class.
    """
    logits = decided(logits)
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    if target is not None:
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - own
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    gap = others.amax(1) - own
    return gap.masked_fill(gap.isnan(), torch.inf)


def height(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a finite margin (N,) that is positive exactly where a row fools, also for ties."""
    gap = margin(logits, labels)
    return torch.where(fools(logits, labels), gap.clamp(_LEAST, _MOST), gap.clamp_max(0))


def rival(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Return the rank-th likeliest wrong class (N,), from 1; the last if there are fewer."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    order = others.argsort(dim=1, descending=True, stable=True)
    return order[:, min(rank, logits.shape[1] - 1) - 1]


def dlr(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio (N,), invariant to scale and shift of the logits.

    It is the margin, to the likeliest wrong class or to target, divided by a range of the sorted
    logits ``z_(1) >= z_(2) >= ...`` (Croce, Hein 2020, arXiv:2003.01690, equations 6 and 7):
    ``z_(1) - z_(3)``, or with a target ``z_(1) - (z_(3) + z_(4)) / 2``. Three classes have no
    ``z_(4)``: with a target the mean is that of ``z_(2)`` and ``z_(3)``, since ``z_(1) - z_(3)``
    may be the margin itself. For two classes it is the plain margin.
    """
    gap = margin(logits, labels, target)
    count = min(logits.shape[1], 4)
    if count == 2:
        return gap
    top = logits.topk(count, dim=1).values
    low = top[:, 2] if target is None else top[:, -2:].mean(1)
    return gap / (top[:, 0] - low).clamp_min(1e-12)


def image_losses(logits: Tensor, labels: Tensor, loss: str,
                 target: Tensor | None = None) -> Tensor:
    """Return the loss that the attacker maximises, (N,).

    Args:
        logits: (N, classes).
        labels: (N,) true classes.
        loss: ``ce``; ``margin``, to the likeliest wrong class or to target; ``dlr``, see
            :func:`dlr`; or ``scaled``: the cross-entropy of logits divided by their own detached
            spread, which does not saturate at any scale of the last layer (as in Gupta, Ajanthan
            2022, arXiv:2003.13511).
        target: (N,) classes.
    """
    if loss in ("margin", "dlr"):
        return (margin if loss == "margin" else dlr)(logits, labels, target)
    if loss == "scaled":
        logits = logits / _spread(logits.detach()).clamp_min(1e-30) * _SPREAD
    return F.cross_entropy(logits, labels, reduction="none")


def ruled_out(logits: Tensor) -> Tensor:
    """Return which logits (N, classes) are so low that they rule their class out.

    These are the ones that :func:`decided` replaced, and masks such as -1e4.
    """
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    highest, second = top[:, :1], top[:, -1:]
    size = torch.maximum(highest - second, highest.abs().clamp_min(1))
    far: Tensor = highest - logits > _RULED_OUT * size
    return far


def says_one(logits: Tensor) -> Tensor:
    """Return which rows (N,) of logits from :func:`decided` carry no more than the top class.

    All other classes are ruled out, or the top logit was infinite: no gradient leads to another.
    """
    order = logits.sort(dim=1, descending=True).values
    if order.shape[1] < 2:
        return torch.zeros_like(order[:, 0], dtype=torch.bool)
    highest, second, last = order[:, 0], order[:, 1], order[:, -1]
    size = torch.maximum(second.abs(), last.abs()).clamp_min(_RULED_OUT)
    infinite = torch.isclose(highest - second, _RULED_OUT * torch.maximum(second - last, size),
                             rtol=1e-4)
    alone: Tensor = (highest - second > 0.99 * _RULED_OUT ** 2) & (second == last)
    return alone | infinite


def _spread(logits: Tensor) -> Tensor:
    """Return the distance of the top logit from the mean of those not ruled out, (N, 1)."""
    far = ruled_out(logits)
    distance = logits.amax(1, keepdim=True) - logits
    return distance.masked_fill(far, 0).sum(1, keepdim=True) / (~far).sum(1, keepdim=True)


def attack_loss(logits: Tensor, labels: Tensor, loss: str, target: Tensor | None = None) -> Tensor:
    """Return the sum over images of :func:`image_losses`."""
    return image_losses(logits, labels, loss, target).sum()


def project(x: Tensor, center: Tensor, eps: float, norm: str,
            bounds: tuple[float, float]) -> Tensor:
    """Return x projected on the eps ball around center and clipped to the bounds.

    In L2 clipping after the projection is safe, since it only shortens the difference.
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
    """Return the steepest ascent direction, of unit length in the norm."""
    if norm == "linf":
        return gradient.sign()
    # Divided by the largest entry first: squares of a saturated model's gradient underflow.
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
    """Return the gradient of a model's output in its input, as autograd.grad does.

    Returns zeros if the model contains an operation that has no derivative in torch.

    Args:
        leaf: the input.
        output: a scalar, or any tensor together with weights of its shape.
        model: if it is a :class:`PixelModel`, it records a missing derivative.
        weights: gradient of the output; None for a scalar.

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
                                  fix="Check that loss.backward() works for this model.",
                                  ) from error
        record = getattr(model, "record_missing_gradient", None)
        if record is not None:
            record(error)
        return torch.zeros_like(leaf)
    return gradient
