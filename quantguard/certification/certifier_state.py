"""Progress of a certification: the bounds found so far, and the run directory that stores them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from ..core.errors import SpecError
from ..core.file_io import replacing
from ..core.run_dir import arrays
from .graph.graph import ModelGraph
from .rules.intervals import Interval

# The stage of an image when branch and bound is done with it; before that, ``done`` counts methods.
BRANCHED = 3


class CertifierState:
    """Bounds found so far, and which methods each image has been through.

    Attributes:
        lower: (N,) bounds; minus infinity where nothing is known.
        done: (N,) how many methods each image has been through.
        sites: for each quantizer, how many intervals fall on one level, and how many there are.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], n: int,
                 limit: float | None = None) -> None:
        self.path, self.settings, self.limit = path, settings, limit
        self.lower, self.done = np.full(n, -np.inf), np.zeros(n, dtype=np.int64)
        self.sites: dict[str, list[int]] = {}
        self.seconds, self._begin = 0.0, time.monotonic()
        if path is not None and path.exists():
            state, lower, done = arrays(path, "state", "lower", "done")
            saved = json.loads(str(state))
            if saved["settings"] != settings:
                raise SpecError(f"{path.parent} holds a certification of other settings",
                                fix="Use another run directory, or delete this one.")
            self.lower, self.done = lower, done
            self.sites, self.seconds = saved["sites"], saved["seconds"]

    @property
    def spent(self) -> float:
        """Return the seconds that it took, earlier runs included."""
        return self.seconds + time.monotonic() - self._begin

    @property
    def out_of_time(self) -> bool:
        """Return whether the time limit is over."""
        return self.limit is not None and self.spent > self.limit

    @property
    def certified(self) -> int:
        """Return the number of images whose bound is positive."""
        return int((self.lower > 0).sum())

    @property
    def branched(self) -> int:
        """Return the number of images that branch and bound is done with."""
        return int((self.done == BRANCHED).sum())

    def count(self, graph: ModelGraph, node: fx.Node, value: Any) -> None:
        """Count the intervals of a quantizer that fall on one level."""
        site = graph.quantizer(node)
        if site is None or not isinstance(value, Interval):
            return
        counts = self.sites.setdefault(site, [0, 0])
        counts[0] += int((value.lower == value.upper).sum())
        counts[1] += value.lower.numel()

    def save(self) -> None:
        """Write the run directory's file, if there is a run directory."""
        if self.path is None:
            return
        state = {"settings": self.settings, "sites": self.sites, "seconds": self.spent}
        with replacing(self.path) as temporary:
            np.savez(temporary, lower=self.lower, done=self.done, state=json.dumps(state))
