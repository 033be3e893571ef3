"""The time that an evaluation may take, and what of it there was no time for."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from .world import world

# The share of the time that may go into fidelity, and that is kept for the checks of the model.
FIDELITY, CHECKS = 0.1, 0.25


class Budget:
    """Time for a whole evaluation: every part of it asks before it begins.

    Args:
        limit: seconds in all; None: there is no limit, and no clock decides.
        begin: when it began, by ``time.monotonic``.
        replayed: what an evaluation that is replayed had no time for; the same is left out again,
            whatever the clock says. None: this is no replay.

    Attributes:
        forward, gradient: seconds for one image, forward and with a gradient; 0: not measured.
        step: those of a gradient step, which also judges where it climbs something else.
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
        """Return the seconds that are left, negative once it is late."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def measured(self, forward: float, gradient: float, judged: bool) -> None:
        """Take in the seconds for one image; judged: whether what is climbed is a softened twin."""
        self.forward, self.gradient = forward, gradient
        self.step = gradient + forward * judged

    def spend(self, seconds: float) -> None:
        """Count time that an interrupted run of the same has taken."""
        if self.deadline is not None:
            self.deadline -= seconds

    def kept(self, images: int) -> float:
        """Return the seconds that are kept for the checks of so many survivors."""
        if self.limit is None:
            return 0.0
        return min(CHECKS * self.limit, images * (2 * self.gradient + 20 * self.step))

    def fitting(self, name: str, images: int, each: float, keep: float = 0.0,
                share: float = 1.0, whole: bool = False, noun: str = "images") -> int:
        """Return for how many of some images there is time; what is left out is noted.

        Args:
            name: of what takes the time.
            images: how many it is for.
            each: seconds for one of them.
            noun: what they are called, if they are no images.
            keep: seconds that must be left afterwards.
            share: of the whole budget, which it may take at most.
            whole: for all of them, or for none.
        """
        if self.replayed is not None:
            found = [re.fullmatch(rf"{re.escape(name)} \(done: (\d+) of \d+ {noun}\)", said)
                     for said in self.replayed]
            return next((int(match[1]) for match in found if match), images)
        if self.limit is None or not images:
            return images
        time_for = min(self.left - keep, share * self.limit)
        few = min(images, max(0, int(time_for / each))) if each > 0 else images * (time_for > 0)
        few = int(world().agreed(0 if whole and few < images else few))
        if few < images:
            self.skipped.append(f"{name} (done: {few} of {images} {noun})")
        return few
