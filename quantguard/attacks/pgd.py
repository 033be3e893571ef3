"""Projected gradient descent through a staircase: surrogate gradients, or the softened twin.

Madry et al. 2018, arXiv:1706.06083; margin loss as in Carlini & Wagner 2017, arXiv:1608.04644.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor

from ..contexts import at_bits, backward, soften, surrogate_of
from ..errors import SpecError
from ..running import frozen
from ._foolbox import InNorm, fb, known_norm
from .bridge import PixelModel, labels_of, module_of
from .losses import ascend, fools, input_gradient, margin, project, rival
from .noise import image_noise

# Losses that can be made to climb towards a class.
_TARGETED = ("margin", "dlr")
# Batches are not made smaller than this: fewer images take hardly less time.
_LEAST = 8


class Kept:
    """Hold for each image the first point judged that fools the model, else the strongest.

    The strongest is the one with the largest margin of the model as it is.

    Attributes:
        points: (N, ...).
        fallen: (N,) whether the point fools the model.
        rows: which images are climbed still; the others have fallen.
    """

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.points, self._labels = x.clone(), labels
        self.fallen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.rows = torch.arange(len(x), device=x.device)
        self._highest = x.new_full(x.shape[:1], -torch.inf)

    def judge(self, x: Tensor, logits: Tensor) -> None:
        """Take in points x of ``rows``, of which the model as it is makes logits."""
        rows, labels = self.rows, self._labels[self.rows]
        height, fooled = margin(logits, labels), fools(logits, labels)
        new = ~self.fallen[rows] & ((height > self._highest[rows]) | fooled)
        self.points[rows[new]], self._highest[rows[new]] = x[new], height[new]
        self.fallen[rows] |= fooled

    def standing(self) -> Tensor | None:
        """Return what to keep of ``rows`` where a quarter or more of them have fallen, else None.

        Rows are left out by the quarter, so that few sizes of batch occur; what of the rest has
        fallen goes on in vain. ``rows`` are those kept from here on.
        """
        stands = ~self.fallen[self.rows]
        size = len(stands)
        while (less := (3 * size + 3) // 4) >= max(_LEAST, int(stands.sum())):
            size = less
        if size == len(stands):
            return None
        keep = stands.int().argsort(descending=True, stable=True)[:size].sort().values
        self.rows = self.rows[keep]
        return keep


class Climb(InNorm):
    """What PGD and APGD share: where they start, what they climb, what they return.

    Arguments are those of :class:`PGD`.

    Raises:
        SpecError: an unknown loss or norm, or numbers out of range.
    """

    losses: ClassVar[tuple[str, ...]]

    def __init__(self, loss: str, steps: int, *, mode: str, twin: tuple[float, float] | None,
                 norm: str, noise: float, target: int, restart: bool, see_through: bool,
                 by_image: bool, seed: int) -> None:
        if loss not in self.losses:
            raise SpecError(f"loss {loss!r} is unknown",
                            fix=f"Use one of {', '.join(self.losses)}.")
        known_norm(norm)
        if steps < 1:
            raise SpecError(f"steps={steps} must be at least 1")
        if target and loss not in _TARGETED:
            raise SpecError(f"target={target} does not go with loss={loss!r}",
                            fix="Use a loss of a class: "
                            f"{', '.join(name for name in self.losses if name in _TARGETED)}.")
        if target < 0:
            raise SpecError(f"target={target} must be 0, for none, or a rank from 1")
        if not 0 <= noise <= 1:
            raise SpecError(f"noise={noise} must be from 0 to 1")
        self.loss, self.steps, self.mode, self.twin, self.norm = loss, steps, mode, twin, norm
        self.noise, self.target, self.restart, self.seed = noise, target, restart, seed
        self.see_through, self.by_image = see_through, by_image

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            starting_points: Any = None, **kwargs: Any) -> Any:
        """Return for each image the first iterate that fools model, else the strongest.

        The strongest is the one with the largest margin of the model as it is.
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
            if self.see_through:
                module.look_for_foreign_steps(x0)
            kept = self._climb(module, x0, x, labels, target, epsilon, model.bounds)
        return restore(ep.astensor(kept.points))

    @abstractmethod
    def _climb(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
               target: Tensor | None, eps: float, bounds: tuple[float, float]) -> Kept:
        """Climb from x, in the eps ball around x0, and return what was judged best."""

    @abstractmethod
    def _tag(self) -> str:
        """Return what keeps the random numbers of one way of climbing apart from another's."""

    def _hard(self, module: PixelModel) -> bool:
        """Return whether the logits of what is climbed are those of the model as it is."""
        return self.twin is None or not (module.quantized or module.foreign)

    def _sharpness(self, share: float) -> float | None:
        """Return the twin's sharpness share (0 to 1) of the way up."""
        if self.twin is None:
            return None
        low, high = self.twin
        return float(low * (high / low) ** share)

    def _surrogate(self, module: PixelModel, share: float) -> AbstractContextManager[Any]:
        """Return a context in which module is climbed, share (0 to 1) of the way up."""
        k = self._sharpness(share)
        return backward(module, self.mode) if k is None else \
            soften(module, k, by_image=self.by_image)

    @contextmanager
    def _climbed(self, module: PixelModel, share: float) -> Iterator[None]:
        """Make module what is climbed, inside the context."""
        with ExitStack() as stack:
            stack.enter_context(self._surrogate(module, share))
            if self.see_through:
                surrogate = surrogate_of(self.mode)
                stack.enter_context(module.seen_through(
                    self._sharpness(share), self.by_image,
                    surrogate.k if surrogate.mode == "sigmoid" else None))
            yield


class PGD(Climb):
    """PGD with every iterate judged by the model as it is; an image that fell is kept as it fell.

    With ``twin=(k_0, k_1)`` the gradient at step s of S comes from the softened twin of sharpness
    ``k_0 (k_1 / k_0)^(s / (S - 1))``; otherwise from the surrogate ``mode``. On a model without
    staircases both are plain PGD.

    Args:
        loss: ``ce``, ``margin`` or ``scaled``, see :func:`attack_loss`.
        steps: gradient steps.
        rel_step: first step's length over eps; None: 2.5 / steps.
        decay: whether steps shrink linearly to 0.
        mode: backward mode of the staircases.
        twin: sharpness at the first and last step; None: no twin.
        bits: climb the same weights with staircases of so many bits instead, or with 32 without
            any: a transfer.
        norm: ``linf`` or ``l2``.
        noise: radius of the random start over eps, 0 to 1.
        target: with ``margin``: climb towards the class that comes so-and-so many-th, from 1,
            among the wrong ones at the image; 0: towards whichever is nearest.
        average: gradients averaged at each step, over N(0, (eps / 4)^2) around the iterate.
        restart: start around ``starting_points`` where they are given, instead of the image.
        see_through: while climbing, max-pool before a staircase instead of after it, and give
            foreign rounding a gradient; see :func:`quantguard.pooling.pools_first` and
            :func:`quantguard.straight.straight_through`.
        by_image: whether softened thresholds have windows of each image's own: see
            :func:`quantguard.soften`. Some nets fall to these, others to the gaps' windows.
        seed: of the start and the averaging.

    Raises:
        SpecError: an unknown loss, or numbers out of range.
    """

    losses = ("ce", "margin", "scaled")

    def __init__(self, loss: str = "ce", steps: int = 40, *, rel_step: float | None = None,
                 decay: bool = False, mode: str = "ramp",
                 twin: tuple[float, float] | None = None, bits: int | None = None,
                 norm: str = "linf", noise: float = 1.0, target: int = 0, average: int = 1,
                 restart: bool = False, see_through: bool = True, by_image: bool = False,
                 seed: int = 0) -> None:
        super().__init__(loss, steps, mode=mode, twin=twin, norm=norm, noise=noise, target=target,
                         restart=restart, see_through=see_through, by_image=by_image, seed=seed)
        if average < 1:
            raise SpecError(f"average={average} must be at least 1")
        self.rel_step = 2.5 / steps if rel_step is None else rel_step
        self.decay, self.bits, self.average = decay, bits, average

    def _tag(self) -> str:
        return f"pgd {self.loss} {self.mode} {self.twin} {self.bits}"

    def _climb(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
               target: Tensor | None, eps: float, bounds: tuple[float, float]) -> Kept:
        kept = Kept(x, labels)
        for step in range(self.steps + 1):
            last = step == self.steps
            gradient = logits = None
            if not last:
                gradient, logits = self._gradient(module, x, labels, target, step, eps)
            if logits is None:
                with torch.no_grad():
                    logits = module(x)
            kept.judge(x, logits)
            if last or gradient is None or bool(kept.fallen.all()):
                break
            keep = kept.standing()
            if keep is not None:
                x, x0, gradient, labels = x[keep], x0[keep], gradient[keep], labels[keep]
                target = None if target is None else target[keep]
            share = 1 - step / self.steps if self.decay else 1.0
            x = x + share * self.rel_step * eps * ascend(gradient, self.norm)
            x = project(x, x0, eps, self.norm, bounds)
        return kept

    def _hard(self, module: PixelModel) -> bool:
        return self.bits is None and super()._hard(module)

    def _surrogate(self, module: PixelModel, share: float) -> AbstractContextManager[Any]:
        if self.bits is not None:
            return at_bits(module, self.bits)
        return super()._surrogate(module, share)

    def _gradient(self, module: PixelModel, x: Tensor, labels: Tensor, target: Tensor | None,
                  step: int, eps: float) -> tuple[Tensor, Tensor | None]:
        """Return the gradient, and the logits where they are those of the hard model at x."""
        with self._climbed(module, step / max(self.steps - 1, 1)):
            if self.average == 1:
                gradient, logits = input_gradient(module, x, labels, self.loss, target)
                return gradient, logits if self._hard(module) else None
            total = torch.zeros_like(x)
            for number in range(self.average):
                unit = image_noise(x, "normal", self.seed, f"{self._tag()} {step} {number}")
                near = x + eps / 4 * unit
                gradient = input_gradient(module, near, labels, self.loss, target)[0]
                # each counts alike: a saturated point's gradient is small, not less telling
                total += gradient / gradient.flatten(1).abs().mean(1).clamp_min(1e-30).reshape(
                    -1, *[1] * (x.dim() - 1))
        return total, None
