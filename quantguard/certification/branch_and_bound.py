"""Branch and bound: split an undecided ball into smaller boxes until each of them is decided.

A box is a range of pixels and, for some inputs of quantizers, the side of a threshold on which they
are. Linear bounds lose precision where intervals are wide, and smaller boxes have narrower ones
(Wang, Pei, Whitehouse, Yang, Jana 2018, arXiv:1804.10829, for inputs; Bunel, Turkaslan, Torr,
Kohli, Kumar 2018, arXiv:1711.00455, for units). Every split doubles the number of boxes, so this is
for models with few inputs, and for images that are nearly decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..nn.quant_activation import QuantActivation
from .graph.graph import ModelGraph
from .propagation import margins, propagate
from .rules.intervals import Interval


class _Box(NamedTuple):
    """A box of pixels (1, ...), constraints on inputs of quantizers, and its bound.

    ``cuts``: for a quantizer's node and element, the lowest and the highest value of its input.
    """

    lower: Tensor
    upper: Tensor
    cuts: dict[tuple[fx.Node, int], tuple[float, float]]
    gap: float


def branch_and_bound(graph: ModelGraph, ball: Interval, label: Tensor, max_boxes: int, batch: int,
                     broken: Callable[[Tensor], bool], out_of_time: Callable[[], bool]) -> float:
    """Return a lower bound of one image's margin: the smallest over the boxes of its ball.

    Stops when all boxes are decided, when an image in one of them is broken, when there are too
    many, or when time is over.

    Args:
        graph: the model as one graph.
        ball: bounds of one image's pixels, (1, ...), Linf.
        label: (1,), its class.
        max_boxes: the most boxes that may be bounded.
        batch: boxes that are bounded at a time.
        broken: returns whether one of these images (N, ...), float32, is misclassified.
        out_of_time: returns whether the time limit is over.
    """
    waiting = [_Box(ball.lower, ball.upper, {}, -torch.inf)]
    proven, count = torch.inf, 0
    while waiting and count < max_boxes and not out_of_time():
        waiting.sort(key=lambda box: box.gap)  # the least certain ones first: attacks may hit there
        now, waiting = waiting[:batch], waiting[batch:]
        count += len(now)
        bounded = _BoundedBoxes(graph, now, label)
        if broken(bounded.candidates()):
            return min(proven, float(bounded.gaps.min()), *(box.gap for box in waiting))
        for row, gap in enumerate(bounded.gaps.tolist()):
            if gap > 0:
                proven = min(proven, gap)
            else:
                waiting += bounded.split(row)
    return min([proven, *(box.gap for box in waiting)])


class _BoundedBoxes:
    """Bounds of some boxes of one image, and the best place to split each.

    Attributes:
        gaps: (N,) lower bounds of the margin; infinity where the box is empty.
        inputs: by quantizer's node, the bounds of its input.
    """

    def __init__(self, graph: ModelGraph, boxes: Sequence[_Box], label: Tensor) -> None:
        self.graph, self.boxes = graph, boxes
        self.pixels = Interval(torch.cat([b.lower for b in boxes]),
                               torch.cat([b.upper for b in boxes]))
        self.inputs: dict[fx.Node, Interval] = {}
        outputs: dict[fx.Node, Interval] = {}
        self.empty = torch.zeros(len(boxes), dtype=torch.bool, device=label.device)

        def visit(node: fx.Node, value: Any) -> None:
            if node in self.inputs:
                outputs[node] = value
        logits = propagate(graph, self.pixels, True, visit, self._narrow)
        labels = label.expand(len(boxes))
        found: dict[int, list[Tensor]] = {b.number: [] for b in (self.pixels, *outputs.values())}
        gaps = torch.fmax(margins(logits, labels, True, found),  # NaN: nothing is known
                          margins(logits, labels, False))
        gap, worst = gaps.nan_to_num(-torch.inf, torch.inf, -torch.inf).min(1)
        self.gaps = torch.where(self.empty, torch.inf, gap)
        self._choose_splits(outputs, found, worst)

    def _choose_splits(self, outputs: dict[fx.Node, Interval], found: dict[int, list[Tensor]],
                       worst: Tensor) -> None:
        """Choose the element of each box on which most of its bound depends.

        Candidates are the pixels, and the outputs of the first quantizer that is undecided: later
        values follow from those.
        """
        each = torch.arange(len(self.boxes), device=worst.device)

        def coefficients(interval: Interval) -> Tensor:
            rows = found[interval.number]
            if not rows:
                return torch.zeros_like(interval.lower)
            return torch.cat(rows, 1)[each, worst].nan_to_num()
        self.coefficients = coefficients(self.pixels)
        width = (self.pixels.upper - self.pixels.lower).flatten(1)
        most, self.element = (self.coefficients.abs().flatten(1) * width).max(1)
        self.node: list[fx.Node | None] = [None] * len(self.boxes)
        unchosen = torch.ones_like(self.empty)
        for node, out in outputs.items():
            steps = (out.upper - out.lower).flatten(1)
            undecided = steps.amax(1) > 0
            much, at = (coefficients(out).abs().flatten(1) * steps).max(1)
            at = torch.where(much > 0, at, steps.argmax(1))  # the widest, if no coefficient differs
            better = unchosen & undecided & ((much > most) | (most <= 0))
            self.element = torch.where(better, at, self.element)
            for row in better.nonzero().flatten().tolist():
                self.node[row] = node
            unchosen &= ~undecided
        self.element = torch.where(unchosen & (most <= 0), width.argmax(1), self.element)

    def _narrow(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Narrow the input of a quantizer to the sides of thresholds that the boxes are on."""
        module = self._module(node)
        at = 0 if module.absorbs or type(module.function) is nn.Identity else 1
        if len(args) <= at:  # the quantizer computes the activation itself
            return args
        z = args[at]
        cuts = [(row, element, low, high) for row, box in enumerate(self.boxes)
                for (site, element), (low, high) in box.cuts.items() if site is node]
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
        module = self.graph.module(node)
        assert isinstance(module, QuantActivation)
        return module

    def candidates(self) -> Tensor:
        """Return images of the boxes that may be broken, float32: centers and worst corners."""
        lower, upper = self.pixels.lower, self.pixels.upper
        worst = torch.where(self.coefficients > 0, lower, upper)
        return torch.cat([(lower + upper) / 2, worst]).float()

    def split(self, row: int) -> list[_Box]:
        """Return the two halves of one box, split at the element that matters most."""
        box, node, element = self.boxes[row], self.node[row], int(self.element[row])
        gap = float(self.gaps[row])
        places = self._thresholds_inside(row, node, element)
        if node is None or not len(places):
            if node is not None:  # rounding noise: no float32 number on one of its sides
                element = int((box.upper - box.lower).argmax())
            low, high = box.lower.flatten(), box.upper.flatten()
            middle = (low[element] + high[element]) / 2
            lower, upper = low.clone(), high.clone()
            lower[element] = upper[element] = middle
            return [box._replace(upper=upper.reshape_as(box.upper), gap=gap),
                    box._replace(lower=lower.reshape_as(box.lower), gap=gap)]
        z, key = self.inputs[node], (node, element)
        left, right = (float(side[row].flatten()[element]) for side in (z.lower, z.upper))
        place = places[(places - (left + right) / 2).abs().argmin()]
        above = float(torch.nextafter(place.float(), torch.full_like(place, torch.inf).float()))
        return [box._replace(cuts={**box.cuts, key: (left, float(place))}, gap=gap),
                box._replace(cuts={**box.cuts, key: (above, right)}, gap=gap)]

    def _thresholds_inside(self, row: int, node: fx.Node | None, element: int) -> Tensor:
        """Return the thresholds that lie inside the interval of one input of a quantizer."""
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
