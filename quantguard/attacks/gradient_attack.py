"""Base class of PGD and APGD: start points, surrogate gradients, and the best points found."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor

from ..core.errors import SpecError
from ..core.module_utils import frozen
from ..nn.contexts import backward, soften, surrogate_of
from .base import NormBallAttack, check_norm, fb
from .foolbox_model import labels_of, module_of
from .losses import fools, margin, project, rival
from .noise import image_noise
from .pixel_model import PixelModel

# Losses that accept a target class.
_TARGETED = ("margin", "dlr")
# Smallest batch that survivors are reduced to: fewer images take hardly less time.
_LEAST = 8


class BestFound:
    """Best point of each image so far: the first that fools the model, else the strongest.

    The strongest point is the one with the largest margin of the original (not softened) model.

    Attributes:
        points: (N, ...).
        already_fooled: (N,) whether the point fools the model.
        rows: indices of the images that are still attacked; all others are broken.
    """

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.points, self._labels = x.clone(), labels
        self.already_fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.rows = torch.arange(len(x), device=x.device)
        self._highest = x.new_full(x.shape[:1], -torch.inf)

    def judge(self, x: Tensor, logits: Tensor) -> None:
        """Update with points x of ``rows`` and the original model's logits there."""
        rows, labels = self.rows, self._labels[self.rows]
        height, fooled = margin(logits, labels), fools(logits, labels)
        new = ~self.already_fooled[rows] & ((height > self._highest[rows]) | fooled)
        self.points[rows[new]], self._highest[rows[new]] = x[new], height[new]
        self.already_fooled[rows] |= fooled

    def survivors(self) -> Tensor | None:
        """Return the positions in ``rows`` to continue with, or None to continue with all.

        The batch shrinks in steps of a quarter, so that only a few batch sizes occur. Up to the
        next step, broken images stay in the batch. ``rows`` is reduced to the returned positions.
        """
        survives = ~self.already_fooled[self.rows]
        size = len(survives)
        while (less := (3 * size + 3) // 4) >= max(_LEAST, int(survives.sum())):
            size = less
        if size == len(survives):
            return None
        remaining = survives.int().argsort(descending=True, stable=True)[:size].sort().values
        self.rows = self.rows[remaining]
        return remaining


class GradientAttack(NormBallAttack):
    """Gradient ascent in a ball: start point, surrogate model and result of PGD and APGD.

    The arguments are those of :class:`quantguard.attacks.pgd.PGD`.

    Raises:
        SpecError: an unknown loss or norm, or numbers out of range.
    """

    losses: ClassVar[tuple[str, ...]]

    def __init__(self, loss: str, steps: int, *, mode: str, sharpness: tuple[float, float] | None,
                 norm: str, noise: float, target: int, restart: bool, bpda: bool,
                 by_image: bool, seed: int) -> None:
        if loss not in self.losses:
            raise SpecError(f"loss {loss!r} is unknown",
                            fix=f"Use one of {', '.join(self.losses)}.")
        check_norm(norm)
        if steps < 1:
            raise SpecError(f"steps={steps} must be at least 1")
        if target and loss not in _TARGETED:
            targeted = ", ".join(name for name in self.losses if name in _TARGETED)
            raise SpecError(f"target={target} does not go with loss={loss!r}",
                            fix=f"Use a loss that takes a target class: {targeted}.")
        if target < 0:
            raise SpecError(f"target={target} must be 0 (no target) or a rank from 1")
        if not 0 <= noise <= 1:
            raise SpecError(f"noise={noise} must be from 0 to 1")
        self.loss, self.steps, self.mode, self.sharpness = loss, steps, mode, sharpness
        self.norm, self.noise, self.target, self.restart = norm, noise, target, restart
        self.seed, self.bpda, self.by_image = seed, bpda, by_image

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            starting_points: Any = None, **kwargs: Any) -> Any:
        """Return for each image the first iterate that fools the model, else the strongest.

        The strongest iterate has the largest margin of the original model.
        """
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        labels, x0, module = labels_of(criterion), wrapped.raw, module_of(model)
        x, target = x0, None
        if self.restart and starting_points is not None:
            x = ep.astensor(starting_points).raw
        x = project(x, x0, epsilon, self.norm, model.bounds)
        if self.noise:
            unit = image_noise(x0, self.norm, self.seed, self._tag())
            x = project(x + self.noise * epsilon * unit, x0, epsilon, self.norm, model.bounds)
        if self.target:
            with torch.no_grad():
                target = rival(module(x0), labels, self.target)
        with frozen(module), module.laid_out(x0):
            if self.bpda:
                module.find_step_functions(x0)
            found = self._maximise(module, x0, x, labels, target, epsilon, model.bounds)
        return restore(ep.astensor(found.points))

    @abstractmethod
    def _maximise(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
                  target: Tensor | None, eps: float, bounds: tuple[float, float]) -> BestFound:
        """Maximise the loss from x in the eps ball around x0, and return the best points."""

    @abstractmethod
    def _tag(self) -> str:
        """Return the salt that gives each configuration its own random numbers."""

    def _judges_itself(self, module: PixelModel) -> bool:
        """Return whether the surrogate has the original model's logits, and only other gradients.

        Otherwise each iterate takes one more forward pass of the original model.
        """
        return self.sharpness is None or not (module.quantized or module.softenable)

    def _sharpness(self, progress: float) -> float | None:
        """Return the softened model's sharpness at this share (0 to 1) of the steps."""
        if self.sharpness is None:
            return None
        low, high = self.sharpness
        return float(low * (high / low) ** progress)

    def _quantizer_context(self, module: PixelModel,
                           progress: float) -> AbstractContextManager[Any]:
        """Return the context that gives our quantizers a gradient: surrogate or softened."""
        k = self._sharpness(progress)
        return backward(module, self.mode) if k is None else \
            soften(module, k, by_image=self.by_image)

    @contextmanager
    def _surrogate(self, module: PixelModel, progress: float) -> Iterator[None]:
        """Turn the module into the differentiable surrogate that is maximised, in the context."""
        with ExitStack() as stack:
            stack.enter_context(self._quantizer_context(module, progress))
            if self.bpda:
                surrogate = surrogate_of(self.mode)
                stack.enter_context(module.through_bpda(
                    self._sharpness(progress), self.by_image,
                    surrogate.k if surrogate.mode == "sigmoid" else None))
            yield
