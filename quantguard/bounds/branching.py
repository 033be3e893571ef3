"""Branch and bound: cut what is undecided in two, again and again, until each part is decided.

A part is a box of images and, for some inputs of staircases, on which side of a threshold they
are. What a linear bound loses, it loses because intervals are wide; those of halves are less so
(Wang, Pei, Whitehouse, Yang, Jana 2018, arXiv:1804.10829, for inputs; Bunel, Turkaslan, Torr,
Kohli, Kumar 2018, arXiv:1711.00455, for units). Every cut doubles the parts: this is for models
with few inputs, and for images that are nearly decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..activation import QuantActivation
from .boxes import Box
from .flat import Flat
from .propagation import margins, propagate


class _Part(NamedTuple):
    """Hold a box of pixels (1, ...), between what some staircases' inputs lie, and its bound.

    ``cuts``: by staircase's node and element, the lowest and the highest value of its input.
    """

    lower: Tensor
    upper: Tensor
    cuts: dict[tuple[fx.Node, int], tuple[float, float]]
    gap: float


def divided(flat: Flat, box: Box, label: Tensor, parts: int, batch: int,
            broken: Callable[[Tensor], bool], late: Callable[[], bool]) -> float:
    """Return a lower bound of one image's margin: the smallest of the parts it was cut into.

    Stops where all parts are decided, where an image in one of them is broken, or where there are
    too many.

    Args:
        flat: the model as one graph.
        box: bounds of one image's pixels, (1, ...), Linf.
        label: (1,), its class.
        parts: the most parts that may be bounded.
        batch: parts that are bounded at a time.
        broken: says whether one of these images (N, ...), float32, is misclassified.
        late: whether there is no time left.
    """
    waiting = [_Part(box.lower, box.upper, {}, -torch.inf)]
    proven, bounded = torch.inf, 0
    while waiting and bounded < parts and not late():
        waiting.sort(key=lambda part: part.gap)  # where least is known, an attacker looks, too
        now, waiting = waiting[:batch], waiting[batch:]
        bounded += len(now)
        look = _Look(flat, now, label)
        if broken(look.likely()):
            return min(proven, float(look.gaps.min()), *(part.gap for part in waiting))
        for row, gap in enumerate(look.gaps.tolist()):
            if gap > 0:
                proven = min(proven, gap)
            else:
                waiting += look.halves(row)
    return min([proven, *(part.gap for part in waiting)])


class _Look:
    """Bound some parts of one image, and find where each is best cut.

    Attributes:
        gaps: (N,) lower bounds of the margin; infinity where no image is in the part.
    """

    def __init__(self, flat: Flat, parts: Sequence[_Part], label: Tensor) -> None:
        self.flat, self.parts = flat, parts
        self.box = Box(torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts]))
        self.inputs: dict[fx.Node, Box] = {}
        outputs: dict[fx.Node, Box] = {}
        self.empty = torch.zeros(len(parts), dtype=torch.bool, device=label.device)

        def seen(node: fx.Node, value: Any) -> None:
            if node in self.inputs:
                outputs[node] = value
        logits = propagate(flat, self.box, True, seen, self._inside)
        labels = label.expand(len(parts))
        pulls: dict[int, list[Tensor]] = {b.number: [] for b in (self.box, *outputs.values())}
        gaps = torch.fmax(margins(logits, labels, True, pulls),  # NaN: nothing is known
                          margins(logits, labels, False))
        gap, worst = gaps.nan_to_num(-torch.inf, torch.inf, -torch.inf).min(1)
        self.gaps = torch.where(self.empty, torch.inf, gap)
        each = torch.arange(len(parts), device=label.device)

        def pull(box: Box) -> Tensor:
            rows = pulls[box.number]
            return torch.cat(rows, 1)[each, worst].nan_to_num() if rows else torch.zeros_like(
                box.lower)
        self.pull = pull(self.box)
        # How much of the bound hangs on each pixel, and on what the first staircase makes of it
        # that is undecided: what comes later follows from that.
        width = (self.box.upper - self.box.lower).flatten(1)
        weight = self.pull.abs().flatten(1) * width
        most, self.element = weight.max(1)
        self.node: list[fx.Node | None] = [None] * len(parts)
        open_ = torch.ones_like(self.empty)
        for node, out in outputs.items():
            steps = (out.upper - out.lower).flatten(1)
            undecided = steps.amax(1) > 0
            much, at = (pull(out).abs().flatten(1) * steps).max(1)
            at = torch.where(much > 0, at, steps.argmax(1))  # where nothing pulls, the widest
            better = open_ & undecided & ((much > most) | (most <= 0))
            self.element = torch.where(better, at, self.element)
            for row in better.nonzero().flatten().tolist():
                self.node[row] = node
            open_ &= ~undecided
        self.element = torch.where(open_ & (most <= 0), width.argmax(1), self.element)

    def _inside(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Narrow the input of a staircase to the sides that parts are on."""
        module = self._module(node)
        at = 0 if module.absorbs or type(module.function) is nn.Identity else 1
        if len(args) <= at:  # what it quantizes is worked out inside
            return args
        z = args[at]
        cuts = [(row, element, low, high) for row, part in enumerate(self.parts)
                for (site, element), (low, high) in part.cuts.items() if site is node]
        if cuts:
            rows, elements, low, high = (torch.tensor(v, device=z.lower.device)
                                         for v in zip(*cuts, strict=True))
            lower, upper = z.lower.flatten(1).clone(), z.upper.flatten(1).clone()
            lower[rows, elements] = torch.maximum(lower[rows, elements], low.double())
            upper[rows, elements] = torch.minimum(upper[rows, elements], high.double())
            self.empty |= (lower > upper).any(1)
            upper = torch.maximum(lower, upper)
            z = dataclasses.replace(z, lower=lower.reshape(z.shape), upper=upper.reshape(z.shape))
        self.inputs[node] = z
        return (*args[:at], z, *args[at + 1:])

    def _module(self, node: fx.Node) -> QuantActivation:
        module = self.flat.module(node)
        assert isinstance(module, QuantActivation)
        return module

    def likely(self) -> Tensor:
        """Return images of the parts that may be broken, float32: middles, and worst corners."""
        lower, upper = self.box.lower, self.box.upper
        return torch.cat([(lower + upper) / 2, torch.where(self.pull > 0, lower, upper)]).float()

    def halves(self, row: int) -> list[_Part]:
        """Cut one part in two, where most of its bound hangs."""
        part, node, element = self.parts[row], self.node[row], int(self.element[row])
        gap = float(self.gaps[row])
        places = self._between(row, node, element)
        if node is None or not len(places):
            if node is not None:  # rounding noise: no float32 number on one of its sides
                element = int((part.upper - part.lower).argmax())
            low, high = part.lower.flatten(), part.upper.flatten()
            middle = (low[element] + high[element]) / 2
            lower, upper = low.clone(), high.clone()
            lower[element] = upper[element] = middle
            return [part._replace(upper=upper.reshape_as(part.upper), gap=gap),
                    part._replace(lower=lower.reshape_as(part.lower), gap=gap)]
        z, key = self.inputs[node], (node, element)
        left, right = (float(side[row].flatten()[element]) for side in (z.lower, z.upper))
        place = places[(places - (left + right) / 2).abs().argmin()]
        above = float(torch.nextafter(place.float(), torch.full_like(place, torch.inf).float()))
        return [part._replace(cuts={**part.cuts, key: (left, float(place))}, gap=gap),
                part._replace(cuts={**part.cuts, key: (above, right)}, gap=gap)]

    def _between(self, row: int, node: fx.Node | None, element: int) -> Tensor:
        """Return the thresholds on both sides of which an input of a staircase may be."""
        if node is None:
            return torch.empty(0)
        module, z = self._module(node), self.inputs[node]
        t = module.thresholds.double()
        if module.axis is not None:
            channel = torch.arange(z.shape[module.axis], device=t.device)
            shape = [1] * (len(z.shape) - 1)
            shape[module.axis % len(z.shape) - 1] = -1
            t = t[channel.reshape(shape).expand(z.shape[1:]).flatten()[element]]
        lower, upper = (side[row].flatten()[element] for side in (z.lower, z.upper))
        return t[(lower <= t) & (t < upper)]
