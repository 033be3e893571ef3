"""Bridge around Foolbox's minimum-norm attacks: any batch, any bounds and any model.

Foolbox 3.3.4 leaves gradients on the parameters, draws from torch's global generator, shares draws
and step lengths among the images of a batch, and assumes bounds of (0, 1) in places; one image
without a starting point ends the whole batch. Here every attack runs on pixels rescaled to (0, 1),
and returns the point nearest to the image that fooled the model, or the image itself.
"""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..core.errors import SpecError
from ..core.module_utils import frozen
from ..core.runtime import seeded
from ..data.batches import check_images
from .base import fb
from .foolbox_model import guarded, labels_of, module_of
from .losses import ascend, margin, ruled_out
from .noise import image_noise
from .pixel_model import PixelModel

# How far beyond the boundary a point must be: this share of the image's own margin, and at least
# this many units in the last place of its largest logit. Rounding differs from one batch size to
# another (by 5 units on some CPUs), and must not flip the class back.
_CLEAR, _UNITS = 1e-5, 16


class QueriesSpent(Exception):
    """Raised when the query limit of an image is reached."""


class RecordedModel(fb.models.Model):
    """Foolbox model on (0, 1) that records the nearest point that fooled it for each image.

    Args:
        module: the attacked model.
        x: (N, ...) pixels; if N is 1, it can be called with any number of points at a time.
        labels: (N,) true classes.
        bounds: of the pixels.
        norm: ``linf`` or ``l2``, of the distance.
        limit: queries, after which it raises :class:`QueriesSpent`; None: no limit.
        seed: of the random direction that replaces a zero gradient; None: it stays zero.

    Attributes:
        unit: x on (0, 1).
        point: nearest point that fooled the model, on (0, 1), else ``unit``.
        pixels: the same point in pixels, else x.
        distance: (N,) its distance in pixels; infinite where nothing was found.
        clear: (N,) margin from which a point counts as fooling.
        in_model: whether the model is running, so that an exception is the model's own.
    """

    def __init__(self, module: PixelModel, x: Tensor, labels: Tensor,
                 bounds: tuple[float, float], norm: str, limit: int | None = None,
                 seed: int | None = None) -> None:
        self.module, self.x, self.labels, self.norm, self.seed = module, x, labels, norm, seed
        self.low, self.range = bounds[0], bounds[1] - bounds[0]
        self.unit = ((x - self.low) / self.range).clamp(0, 1)
        self.point, self.pixels = self.unit.clone(), x.clone()
        self.distance = torch.full((len(x),), torch.inf, device=x.device)
        self.left, self.calls, self.in_model = limit, 0, False
        self.clear = torch.zeros_like(self.distance)
        with torch.no_grad():
            logits = self(self.unit)
            self.clear = torch.maximum(
                _CLEAR * margin(logits, labels).abs(),
                _UNITS * torch.finfo(logits.dtype).eps
                * logits.masked_fill(ruled_out(logits), 0).abs().amax(1))

    @property
    def bounds(self) -> Any:
        return fb.types.Bounds(0, 1)

    def __call__(self, inputs: Any) -> Any:
        wrapped, restore = ep.astensor_(inputs)
        point: Tensor = wrapped.raw
        self.calls += 1
        if self.left is not None:
            if len(point) > self.left:
                raise QueriesSpent
            self.left -= len(point)
        if point.requires_grad and self.seed is not None:
            point = point.view_as(point)
            point.register_hook(self._direction)  # type: ignore[no-untyped-call]
        with torch.set_grad_enabled(point.requires_grad):
            pixels = self.low + self.range * point
            # Rounding may lead beyond the bounds, where clamp has no gradient.
            excess = pixels - pixels.clamp(self.low, self.low + self.range)
            pixels = pixels - excess.detach()
            self.in_model = True
            logits = guarded(self.module, pixels)
            self.in_model = False
        self._record(point.detach(), pixels.detach(), logits.detach())
        return restore(ep.astensor(logits))

    def fooled(self, logits: Tensor) -> Tensor:
        """Return which logits, (N, classes) or any number of one image's, name a wrong class."""
        height = margin(logits, self.labels.expand(len(logits)))
        return height > self.clear

    def _record(self, point: Tensor, pixels: Tensor, logits: Tensor) -> None:
        fooled = self.fooled(logits)
        order = 2 if self.norm == "l2" else torch.inf
        distance = torch.where(fooled, (pixels - self.x).flatten(1).norm(order, dim=1), torch.inf)
        if len(self.x) == 1:
            best = distance.argmin().reshape(1)
            point, pixels, distance = point[best], pixels[best], distance[best]
        closer = distance < self.distance
        for recorded, new in ((self.point, point), (self.pixels, pixels),
                              (self.distance, distance)):
            recorded[closer] = new[closer]

    def _direction(self, gradient: Tensor) -> Tensor:
        """Return the gradient at unit length, or noise of the image's own where it is zero."""
        unit = ascend(gradient, "l2")
        zero = unit.flatten(1).abs().amax(1) == 0
        if bool(zero.any()):
            noise = image_noise(self.x[zero], "normal", self.seed or 0, f"direction {self.calls}")
            unit[zero] = noise.to(unit)
        return unit


class _Fooled(fb.criteria.Misclassification):
    """Misclassification by the margin that a recorded model requires."""

    def __init__(self, recorded: RecordedModel) -> None:
        super().__init__(recorded.labels)
        self.recorded = recorded

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        logits, restore = ep.astensor_(outputs)
        return restore(ep.astensor(self.recorded.fooled(logits.raw)))


class FoolboxBridge(fb.attacks.base.MinimizationAttack):
    """Mixin that replaces the ``run`` of one of Foolbox's minimum-norm attacks.

    Raises:
        DataError: images outside the bounds.
        SpecError: a targeted criterion.
    """

    norm: str
    seed: int | None = None

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None,
            **kwargs: Any) -> Any:
        """Return for each image the nearest point that fooled the model, else the image itself."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        x, labels, module = wrapped.raw, labels_of(criterion), module_of(model)
        check_images(x, model.bounds, f"inputs of {type(self).__name__}")
        with frozen(module):
            found = self._search(module, x, labels, model.bounds)
        return restore(ep.astensor(found))

    def _search(self, module: PixelModel, x: Tensor, labels: Tensor,
                bounds: tuple[float, float]) -> Tensor:
        recorded = RecordedModel(module, x, labels, bounds, self.norm, seed=self.seed)
        with seeded(0):  # Foolbox draws numbers that it does not use
            self._run_foolbox(recorded)
        return recorded.pixels

    def _run_foolbox(self, recorded: RecordedModel, **options: Any) -> None:
        super().run(recorded, recorded.unit, _Fooled(recorded), **options)


def check_positive(**numbers: float) -> None:
    """Check that arguments, passed by their names, are above 0.

    Raises:
        SpecError: one is not.
    """
    for name, number in numbers.items():
        if not number > 0:
            raise SpecError(f"{name}={number} must be above 0")
