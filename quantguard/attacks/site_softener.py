"""Softening of other people's quantizers while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import step_functions as step_fit
from .numbered_calls import NumberedCalls, Place
from .step_sites import Site


class SiteSoftener(NumberedCalls):
    """Mode that gives readers of a site the softened steps of z, or y with a surrogate gradient.

    Args:
        sites: of the model that is run.
        k: sharpness; None: y keeps its values and gets a gradient.
        by_image: as of :func:`quantguard.soften`.
        slope: without k: sharpness of the softened steps whose gradient is used; None: that of the
            line through the steps.
    """

    def __init__(self, sites: Sequence[Site], k: float | None, by_image: bool = False,
                 slope: float | None = None) -> None:
        super().__init__()
        self.k, self._by_image, self._slope = k, by_image, slope
        self._sources: dict[int, list[tuple[Place, int]]] = {}
        self._readers: dict[int, list[tuple[Place, int]]] = {}
        self._inside: set[int] = set()
        self._steps = [site.steps for site in sites]
        for number, site in enumerate(sites):
            self._sources.setdefault(site.source.call, []).append((site.source, number))
            for place in site.readers:
                self._readers.setdefault(place.call, []).append((place, number))
            self._inside.update(range(site.source.call + 1, min(p.call for p in site.readers)))
        # By number of the site: its softened steps, or zeros that carry the gradient.
        self._ready: dict[int, Tensor] = {}

    def restart(self, *_: Any) -> None:
        super().restart()
        self._ready = {}

    def relevant(self, number: int) -> bool:
        return number in self._sources or number in self._readers

    def inside_site(self, number: int) -> bool:
        """Return whether a call is part of a known quantizer; it is executed unchanged."""
        return number in self._inside

    def replace_arguments(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        for place, site in self._sources.get(number, ()):
            if not place.result and place.name == name:
                self._soften_source(leaves, place, site)
        for place, site in self._readers.get(number, ()):
            ready = self._ready.get(site)
            if ready is None or place.name != name or place.at >= len(leaves):
                continue
            y = leaves[place.at]
            if isinstance(y, Tensor) and y.shape == ready.shape:
                leaves[place.at] = ready.to(y.dtype) if self.k is not None \
                    else y.detach() + ready.to(y.dtype)
        return leaves

    def replace_result(self, number: int, name: str, result: Any) -> Any:
        leaves: list[Any] | None = None
        for place, site in self._sources.get(number, ()):
            if place.result and place.name == name:
                leaves = tree_leaves(result) if leaves is None else leaves
                self._soften_source(leaves, place, site)
        return result

    def _soften_source(self, leaves: list[Any], place: Place, site: int) -> None:
        """Compute the steps of z at once, as z may be written to before y is read."""
        z = leaves[place.at] if place.at < len(leaves) else None
        # Without gradients a softened model still has softened values; y itself needs nothing.
        wanted = isinstance(z, Tensor) and (
            z.requires_grad if torch.is_grad_enabled() else self.k is not None)
        if isinstance(z, Tensor) and wanted and z.is_floating_point():
            steps = self._steps[site]
            if steps.axis is not None and z.shape[steps.axis] != len(steps.thresholds):
                return
            if self.k is not None:
                self._ready[site] = step_fit.soften(z, steps, self.k, self._by_image)
            elif self._slope is None:
                self._ready[site] = step_fit.slope(z, steps)
            else:
                soft = step_fit.soften(z, steps, self._slope, self._by_image)
                self._ready[site] = soft - soft.detach()
