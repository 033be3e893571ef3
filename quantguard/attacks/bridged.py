"""Foolbox's minimum-norm attacks, safe on any batch, any bounds and any model.

Foolbox 3.3.4 leaves gradients on the parameters, draws from torch's own random numbers, shares
draws and step lengths among the images of a batch, and takes (0, 1) for the bounds here and there;
one image without a starting point ends the whole batch. Here every attack runs on pixels rescaled
to (0, 1), and what it returns is what fooled the model nearest to the image, else the image.
Those that need nothing but the arg max run image by image.
"""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from ..batches import check_images
from ..errors import SpecError
from ..running import frozen, seeded
from ._foolbox import fb, known_norm
from .bridge import PixelModel, guarded, labels_of, module_of
from .losses import ascend, margin, ruled_out
from .noise import image_noise, seed_of

# Queries in one forward pass of an attack that runs image by image.
_TOGETHER = 128
# Random images tried as a start, and points on the way from there to the image.
_STARTS, _BLENDS = 1024, 50
# By how much of the image's own margin a point must be beyond the boundary, and by how many units
# in the last place of its largest logit at least: rounding differs from one size of batch to
# another (by 5 units on some CPUs), and must not turn it back.
_CLEAR, _UNITS = 1e-5, 16


class _Spent(Exception):
    """The queries of an image are used up."""


class _Watched(fb.models.Model):
    """The attacked model on (0, 1), which keeps for each image the nearest point that fooled it.

    Args:
        module: the attacked model.
        x: (N, ...) pixels; of one image any number of points may be asked at a time.
        labels: (N,) true classes.
        bounds: of the pixels.
        norm: ``linf`` or ``l2``: what is near.
        limit: queries, after which it raises; None: no limit.
        seed: of what takes the place of a zero gradient; None: it stays zero.

    Attributes:
        unit: x on (0, 1).
        point: what fooled the model, on (0, 1); pixels: the same in pixels, else x itself.
        distance: (N,) of it, in pixels; infinite where nothing was found.
        clear: (N,) margin from which on a point counts.
        asking: whether the model is at work, and an error is its own.
    """

    def __init__(self, module: PixelModel, x: Tensor, labels: Tensor,
                 bounds: tuple[float, float], norm: str, limit: int | None = None,
                 seed: int | None = None) -> None:
        self.module, self.x, self.labels, self.norm, self.seed = module, x, labels, norm, seed
        self.low, self.range = bounds[0], bounds[1] - bounds[0]
        self.unit = ((x - self.low) / self.range).clamp(0, 1)
        self.point, self.pixels = self.unit.clone(), x.clone()
        self.distance = torch.full((len(x),), torch.inf, device=x.device)
        self.left, self.calls, self.asking = limit, 0, False
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
                raise _Spent
            self.left -= len(point)
        if point.requires_grad and self.seed is not None:
            point = point.view_as(point)
            point.register_hook(self._direction)  # type: ignore[no-untyped-call]
        with torch.set_grad_enabled(point.requires_grad):
            pixels = self.low + self.range * point
            # rounding may lead beyond the bounds, where clamp has no gradient
            excess = pixels - pixels.clamp(self.low, self.low + self.range)
            pixels = pixels - excess.detach()
            self.asking = True
            logits = guarded(self.module, pixels)
            self.asking = False
        self._note(point.detach(), pixels.detach(), logits.detach())
        return restore(ep.astensor(logits))

    def fooled(self, logits: Tensor) -> Tensor:
        """Return which logits, (N, classes) or any number of one image's, name a wrong class."""
        height = margin(logits, self.labels.expand(len(logits)))
        return height > self.clear

    def _note(self, point: Tensor, pixels: Tensor, logits: Tensor) -> None:
        fooled = self.fooled(logits)
        order = 2 if self.norm == "l2" else torch.inf
        distance = torch.where(fooled, (pixels - self.x).flatten(1).norm(order, dim=1), torch.inf)
        if len(self.x) == 1:
            best = distance.argmin().reshape(1)
            point, pixels, distance = point[best], pixels[best], distance[best]
        closer = distance < self.distance
        for kept, new in ((self.point, point), (self.pixels, pixels), (self.distance, distance)):
            kept[closer] = new[closer]

    def _direction(self, gradient: Tensor) -> Tensor:
        """Return the gradient at unit length, or noise of the image's own where it is zero."""
        unit = ascend(gradient, "l2")
        zero = unit.flatten(1).abs().amax(1) == 0
        if bool(zero.any()):
            noise = image_noise(self.x[zero], "normal", self.seed or 0, f"direction {self.calls}")
            unit[zero] = noise.to(unit)
        return unit


class _Fooled(fb.criteria.Misclassification):
    """Misclassification as a watched model sees it."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__(watched.labels)
        self.watched = watched

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        logits, restore = ep.astensor_(outputs)
        return restore(ep.astensor(self.watched.fooled(logits.raw)))


class _Bridged(fb.attacks.base.MinimizationAttack):
    """What every attack of this room does around Foolbox's own ``run``.

    Raises:
        DataError: images outside the bounds.
        SpecError: a targeted criterion.
    """

    norm: str
    seed: int | None = None

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None,
            **kwargs: Any) -> Any:
        """Return for each image the nearest point that fooled model, else the image itself."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        x, labels, module = wrapped.raw, labels_of(criterion), module_of(model)
        check_images(x, model.bounds, f"inputs of {type(self).__name__}")
        with frozen(module):
            found = self._search(module, x, labels, model.bounds)
        return restore(ep.astensor(found))

    def _search(self, module: PixelModel, x: Tensor, labels: Tensor,
                bounds: tuple[float, float]) -> Tensor:
        watched = _Watched(module, x, labels, bounds, self.norm, seed=self.seed)
        with seeded(0):  # Foolbox draws where it does not use it
            self._foolbox(watched)
        return watched.pixels

    def _foolbox(self, watched: _Watched, **options: Any) -> None:
        super().run(watched, watched.unit, _Fooled(watched), **options)


class CarliniWagner(_Bridged, fb.attacks.L2CarliniWagnerAttack):
    """C&W in L2 (Carlini, Wagner 2017, arXiv:1608.04644), every image with all of its steps.

    Foolbox stops early by the loss of the whole batch, which is left out.

    Args:
        binary_search_steps: over the constant c.
        steps: of Adam for each constant.
        stepsize: of Adam, in the space of arctanh.
        initial_const: where c starts, on pixels of (0, 1).
    """

    def __init__(self, binary_search_steps: int = 5, steps: int = 60, *, stepsize: float = 0.05,
                 initial_const: float = 1.0) -> None:
        _positive(binary_search_steps=binary_search_steps, steps=steps, stepsize=stepsize,
                  initial_const=initial_const)
        super().__init__(binary_search_steps, steps, stepsize, 0, initial_const, False)
        self.norm = "l2"


class DDN(_Bridged, fb.attacks.DDNAttack):
    """Decoupled direction and norm, L2 (Rony et al. 2019, arXiv:1811.09600).

    Where the gradient is zero it goes on in a random direction of the image's own.

    Args:
        steps: gradient steps.
        init_epsilon: first radius, on pixels of (0, 1).
        gamma: by which the radius shrinks or grows at each step.
        seed: of the random directions.
    """

    def __init__(self, steps: int = 100, *, init_epsilon: float = 1.0, gamma: float = 0.05,
                 seed: int = 0) -> None:
        _positive(steps=steps, init_epsilon=init_epsilon, gamma=gamma)
        super().__init__(init_epsilon=init_epsilon, steps=steps, gamma=gamma)
        self.norm, self.seed = "l2", seed


class DeepFool(_Bridged, fb.attacks.deepfool.DeepFoolAttack):
    """DeepFool in L2 or Linf (Moosavi-Dezfooli, Fawzi, Frossard 2016, arXiv:1511.04599).

    Args:
        norm: ``l2`` or ``linf``.
        steps: linearizations at most.
        candidates: classes tried, the likeliest at the image.
        overshoot: how far beyond the boundary, over the distance.
    """

    def __init__(self, norm: str = "l2", steps: int = 50, *, candidates: int = 10,
                 overshoot: float = 0.02) -> None:
        known_norm(norm)
        _positive(steps=steps, overshoot=overshoot)
        if candidates < 2:
            raise SpecError(f"candidates={candidates} must be at least 2")
        super().__init__(steps=steps, candidates=candidates, overshoot=overshoot)
        self.norm = norm

    @property
    def distance(self) -> Any:
        return fb.distances.linf if self.norm == "linf" else fb.distances.l2

    @property
    def _geometry(self) -> Any:
        return fb.attacks.LinfDeepFoolAttack if self.norm == "linf" else fb.attacks.L2DeepFoolAttack

    def get_distances(self, losses: Any, grads: Any) -> Any:
        return self._geometry.get_distances(self, losses, grads)

    def get_perturbations(self, distances: Any, grads: Any) -> Any:
        return self._geometry.get_perturbations(self, distances, grads)


class _OneByOne(_Bridged):
    """Run image by image, each with random numbers of its own and a limit on its queries."""

    steps: int

    @torch.no_grad()
    def _search(self, module: PixelModel, x: Tensor, labels: Tensor,
                bounds: tuple[float, float]) -> Tensor:
        done: dict[tuple[int, int], Tensor] = {}  # batches are filled up with copies
        found = []
        for image, label in zip(x.unsqueeze(1), labels.unsqueeze(1), strict=True):
            key = seed_of(image, f"{self.seed} {type(self).__name__}"), int(label)
            if key not in done:
                watched = _Watched(module, image, label, bounds, self.norm, self.steps)
                with seeded(key[0] % 2 ** 32):
                    self._alone(watched)
                done[key] = watched.pixels
            found.append(done[key])
        return torch.cat(found)

    def _alone(self, watched: _Watched) -> None:
        """Run Foolbox's attack on one image, from a start that has been found for it."""
        try:
            if not watched.distance.isfinite() and _found_start(watched):
                self._foolbox(watched, starting_points=watched.point.clone())
        except _Spent:
            pass
        except (AssertionError, ValueError):
            # Foolbox's own says that a point no longer fools a model which answers at random
            if watched.asking:
                raise


def _found_start(watched: _Watched) -> bool:
    """Let watched find a point that fools the model: on the way to a random image that does.

    Every second lot of random images varies in contrast: a model may see one class in all noise.
    """
    image = watched.unit
    for lot in range(_STARTS // _TOGETHER):
        noise = torch.rand((_TOGETHER, *image.shape[1:]), device=image.device)
        if lot % 2:
            noise *= torch.rand((_TOGETHER, *[1] * (image.dim() - 1)), device=image.device)
        watched(noise)
        if watched.distance.isfinite():
            way = watched.point - image
            for share in torch.linspace(0, 1, _BLENDS + 1).tolist()[1:]:
                if watched.fooled(watched(image + share * way)):
                    break
            return True
    return False


class HopSkipJump(_OneByOne, fb.attacks.HopSkipJumpAttack):
    """HopSkipJump, L2 or Linf, by arg max alone (Chen, Jordan, Wainwright 2020, arXiv:1904.02144).

    Args:
        norm: ``l2`` or ``linf``.
        steps: queries for an image, at most.
        evaluations: queries of the first gradient's estimate; they grow with the square root of
            the iteration.
        gamma: of the binary search's precision.
        seed: of the start and the estimates.
    """

    def __init__(self, norm: str = "l2", steps: int = 5000, *, evaluations: int = 100,
                 gamma: float = 1.0, seed: int = 0) -> None:
        known_norm(norm)
        _enough(steps)
        _positive(evaluations=evaluations, gamma=gamma)
        super().__init__(steps=steps, initial_gradient_eval_steps=evaluations,
                         max_gradient_eval_steps=steps, gamma=gamma, constraint=norm)
        self.norm, self.evaluations, self.seed = norm, evaluations, seed

    def approximate_gradients(self, is_adversarial: Any, x_advs: Any, steps: int,
                              delta: Any) -> Any:
        """Return equation 16's estimate at one image; Foolbox asks one query at a time."""
        x: Tensor = x_advs.raw
        radius = max(float(delta.raw), 1e-12)
        total, plain, votes = torch.zeros_like(x), torch.zeros_like(x), 0.0
        for first in range(0, steps, _TOGETHER):
            u = torch.empty((min(_TOGETHER, steps - first), *x.shape[1:]), device=x.device)
            u = u.normal_() if self.norm == "l2" else u.uniform_(-1, 1)
            points = (x + radius * ascend(u, "l2")).clamp(0, 1)
            u = (points - x) / radius
            phi = is_adversarial(ep.astensor(points)).raw.to(u) * 2 - 1
            total += torch.tensordot(phi, u, 1)
            plain += u.sum(0)
            votes += float(phi.sum())
        mean = votes / steps
        return ep.astensor(ascend(total if abs(mean) == 1 else total - mean * plain, "l2"))


class Boundary(_OneByOne, fb.attacks.BoundaryAttack):
    """Boundary attack in L2, by arg max alone (Brendel, Rauber, Bethge 2018, arXiv:1712.04248).

    One query after the other: about 1 ms each beside the model's own time.

    Args:
        steps: queries for an image, at most.
        spherical_step: first length of the step along the sphere, over the distance.
        source_step: first length of the step towards the image, over the distance.
        seed: of the start and the steps.
    """

    def __init__(self, steps: int = 5000, *, spherical_step: float = 0.01,
                 source_step: float = 0.01, seed: int = 0) -> None:
        _enough(steps)
        _positive(spherical_step=spherical_step, source_step=source_step)
        super().__init__(steps=steps, spherical_step=spherical_step, source_step=source_step)
        self.norm, self.seed = "l2", seed


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise SpecError(f"{name}={number} must be above 0")


def _enough(steps: int) -> None:
    if steps < 2 * _TOGETHER:
        raise SpecError(f"steps={steps} must be at least {2 * _TOGETHER}",
                        why="They are queries, and finding a start takes the first of them.")
