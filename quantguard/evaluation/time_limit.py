"""The time limit of an evaluation, and the list of what it left no time for."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from torch import Tensor

from ..attacks import PixelModel
from ..attacks.losses import input_gradient
from ..attacks.predictions import padded, predict
from ..core.distributed import distributed
from ..nn.contexts import soften
from ..nn.pool_reordering import pools_first

# The share of the time limit that fidelity may take.
FIDELITY_SHARE = 0.1
# The largest share of the time limit that is reserved for the checks of survivors.
CHECKS_SHARE = 0.25
# Speed is measured on this many images if they take at least this many seconds, else on a batch.
_TIMED_IMAGES, _MIN_SECONDS = 8, 0.05


class Budget:
    """Time limit of a whole evaluation. Every part of it asks for time before it begins.

    Args:
        limit: seconds in all; None: there is no limit, and no clock decides.
        begin: start of the evaluation, by ``time.monotonic``.
        replayed: the ``skipped`` list of an evaluation that is replayed: the same is left out
            again, whatever the clock says. None: this is not a replay.

    Attributes:
        forward: seconds of one image's forward; 0: not measured.
        gradient: seconds of one image's forward and backward; 0: not measured.
        step: seconds of one image's gradient step, with a forward of the quantized model where the
            attack maximises the loss of the softened one.
        skipped: names of what there was no time for.
    """

    def __init__(self, limit: float | None, begin: float,
                 replayed: Sequence[str] | None = None) -> None:
        self.limit = None if replayed is not None else limit
        self.deadline = None if self.limit is None else begin + self.limit
        self.replayed = replayed
        self.forward = self.gradient = self.step = 0.0
        self.skipped: list[str] = list(replayed or ())

    @property
    def left(self) -> float:
        """Return the seconds that are left; negative after the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def set_speed(self, forward: float, gradient: float, softened: bool) -> None:
        """Store the seconds of one image.

        Args:
            forward: of its forward.
            gradient: of its forward and backward.
            softened: whether attacks go through a softened model.
        """
        self.forward, self.gradient = forward, gradient
        self.step = gradient + forward * softened

    def spend(self, seconds: float) -> None:
        """Subtract time that an interrupted run of the same evaluation took."""
        if self.deadline is not None:
            self.deadline -= seconds

    def reserved(self, survivors: int) -> float:
        """Return the seconds that are reserved for the checks of some survivors."""
        if self.limit is None:
            return 0.0
        return min(CHECKS_SHARE * self.limit, survivors * (2 * self.gradient + 20 * self.step))

    def fitting(self, name: str, images: int, each: float, reserve: float = 0.0,
                share: float = 1.0, whole: bool = False, noun: str = "images") -> int:
        """Return how many of some images there is time for, and list the rest as skipped.

        Args:
            name: of the work.
            images: the number of images.
            each: seconds for one image.
            reserve: seconds that must be left afterwards.
            share: the largest share of the whole limit that the work may take.
            whole: work on all images or on none.
            noun: the word for images in the list of skipped work.
        """
        if self.replayed is not None:
            found = [re.fullmatch(rf"{re.escape(name)} \(done: (\d+) of \d+ {noun}\)", skipped)
                     for skipped in self.replayed]
            return next((int(match[1]) for match in found if match), images)
        if self.limit is None or not images:
            return images
        time_for = min(self.left - reserve, share * self.limit)
        few = min(images, max(0, int(time_for / each))) if each > 0 else images * (time_for > 0)
        few = int(distributed().agreed(0 if whole and few < images else few))
        if few < images:
            self.skipped.append(f"{name} (done: {few} of {images} {noun})")
        return few


def seconds_per_image(model: PixelModel, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the seconds of one image: of its forward, and of its forward and backward.

    The model is measured as attacks use it, softened if it is quantized. If a few images take long
    enough to measure, the rest of the batch is left out.
    """
    x, labels = (padded(v, max(len(v), 2))[0] for v in (x, labels))
    few, few_labels = x[:_TIMED_IMAGES], labels[:_TIMED_IMAGES]
    seconds = [_seconds(model, few, few_labels, gradient) for gradient in (False, True)]
    if sum(seconds) * _TIMED_IMAGES < _MIN_SECONDS:
        seconds = [_seconds(model, x, labels, gradient) for gradient in (False, True)]
    return seconds[0], seconds[1]


def _seconds(model: PixelModel, x: Tensor, labels: Tensor, gradient: bool) -> float:
    """Return the seconds that each of these images takes."""
    with soften(model, 8.0), pools_first(model):
        for _ in range(2):  # the first run compiles, or looks for the fastest kernel
            begin = time.monotonic()
            if gradient:
                input_gradient(model, x, labels, "margin")[0].sum().item()
            else:
                predict(model, x, len(x), attacked=True).sum().item()
            seconds = time.monotonic() - begin
    return seconds / len(x)
