"""Propagation of sound bounds: intervals forward through a graph, linear bounds backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..core.errors import ConversionError
from ..core.specs import Threat
from .graph.graph import ModelGraph
from .graph.interpreter import IntervalInterpreter
from .graph.nodes import node_name, rule_for
from .rules.affine import normed
from .rules.intervals import Ball, Interval, U, narrowed
from .rules.linear_bounds import dot
from .rules.registry import apply

# Attackers clip to the ball in float32, which rounds eps, the sum and the bounds: the ball that is
# certified is larger by as much.
_WIDER = 4 * U
# The rounding of one term in float64.
_DOUBLE = 2.0**-52
# Coefficients of one image and one row of a linear bound that fit: 2^24 doubles are 128 MB.
_LARGEST_BATCH = 1 << 24

Visit = Callable[[fx.Node, Any], None]
Narrow = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]


def around(pixels: Tensor, threat: Threat, snapped: float = 0.0, brief: bool = False) -> Interval:
    """Return the interval of all images that the threat allows.

    Args:
        pixels: (N, ...) within the threat's bounds.
        snapped: how far each pixel may be from the image that is meant.
        brief: compute in float32 from here on, where that is sound: Linf, on a CPU. (Convolutions
            on GPUs may be algorithms whose rounding nobody bounds.)
    """
    x, (low, high) = pixels.double(), threat.bounds
    slack = _WIDER * max(abs(low), abs(high), threat.eps) + snapped
    reach = threat.eps + slack
    lower, upper = (x - reach).clamp(min=low - slack), (x + reach).clamp(max=high + slack)
    if threat.norm == "linf" and brief and pixels.device.type == "cpu":
        return Interval(narrowed(lower, up=False), narrowed(upper, up=True))
    if threat.norm == "linf":
        return Interval(lower, upper)
    # An attacker's own sum of squares in float32 may be off, and so may each clipped pixel.
    many = x[0].numel() ** 0.5 * slack
    ball = Ball(x, torch.ones_like(x[:1]), torch.zeros_like(x[:1]),
                threat.eps * (1 + 1e-4) + many)
    return Interval(lower, upper, None, ball)


def check_faithful(graph: ModelGraph, points: Tensor, threat: Threat, answers: Tensor) -> None:
    """Check that a model computes what its graph says, at some images, up to float32 rounding.

    Args:
        points: (N, ...) pixels.
        answers: (N, C) the model's own logits of them.

    Raises:
        ConversionError: it does not.
    """
    bounds = propagate(graph, around(points, replace(threat, eps=0.0)))
    wrong = (answers.double() < bounds.lower) | (answers.double() > bounds.upper)
    if bool(wrong.any()):
        off = float(torch.maximum(bounds.lower - answers, answers - bounds.upper).amax())
        raise ConversionError(
            "the model does not compute what its graph says",
            why=f"A logit is off by {off:.2g} more than rounding allows: the forward may branch on "
                "values, be random, keep state between calls, or run in less than float32.",
            fix="This model cannot be certified as it is.")


def propagate(graph: ModelGraph, x: Interval, taped: bool = False, visit: Visit | None = None,
              narrow: Narrow | None = None) -> Interval:
    """Return the bounds of the logits.

    Args:
        x: bounds of pixels.
        taped: keep what :func:`margins` needs to go back through the whole graph.
        visit: is called with every node and its value, an interval or what does not depend on the
            image; except for layers that only a BatchNorm reads: those are bounded together.
        narrow: gets a quantizer's node and arguments, and returns the arguments to use.

    Raises:
        ConversionError: an operation without a rule for how it is called.
    """
    logits = _Bounds(graph, taped, visit, narrow).run(x)
    if not isinstance(logits, Interval) or len(logits.shape) != 2:
        found = tuple(logits.shape) if isinstance(logits, Interval) else type(logits).__name__
        raise ConversionError(f"the model returns {found} where logits (N, classes) are needed")
    return logits


class _Bounds(IntervalInterpreter[Interval]):
    """A run of a graph on sound bounds; arguments as in :func:`propagate`."""

    interval = Interval

    def __init__(self, graph: ModelGraph, taped: bool, visit: Visit | None,
                 narrow: Narrow | None) -> None:
        super().__init__(graph)
        self.taped, self.visit, self.narrow = taped, visit, narrow

    def bound(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph = self.graph
        if node in graph.normed:  # bounded together with its BatchNorm
            return args[0]
        if self.narrow is not None and graph.quantizer(node) is not None \
                and self.holds_intervals(args):
            args = self.narrow(node, args)
        rule, name = rule_for(graph.root, node), node_name(graph.root, node)
        if rule is None:
            raise ConversionError(f"{name} cannot be bounded", why="It has no rule.")
        if node.op != "call_module":
            return apply(rule.bound, args, kwargs, name)
        if node.args and node.args[0] in graph.normed:
            layer = graph.module(cast("fx.Node", node.args[0]))
            return apply(normed, (layer, graph.module(node), *args), kwargs, name)
        return apply(rule.bound, (graph.module(node), *args), kwargs, name)

    def plain(self, value: Interval) -> Tensor:
        return value.lower.float()

    def computed(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Interval) and not self.taped and value.step is not None \
                and not value.step.affine:
            value.step = None
        if self.visit is not None and node not in self.graph.normed:
            self.visit(node, value)
        return value


def margins(logits: Interval, labels: Tensor, through: bool,
            wanted: dict[int, list[Tensor]] | None = None) -> Tensor:
    """Return a lower bound of each true logit minus each other one.

    The last layers are bounded together, ``(W_y - W_j) x``, instead of logit by logit.

    Args:
        logits: (N, C), with their steps.
        labels: (N,) true classes.
        through: go back through activations as well, to the pixels (CROWN); otherwise stop at the
            intervals of the last activations.
        wanted: by number of an interval, receives the coefficients of its values, (N, K, ...) for
            K classes at a time.

    Returns:
        (N, C), infinity for the true class.
    """
    n, classes = logits.shape
    rows = torch.eye(classes, dtype=torch.float64, device=labels.device)
    result = logits.lower.new_full((n, classes), torch.inf, dtype=torch.float64)
    widest = max((v.lower[0].numel() for v in _history(logits, through)), default=classes)
    per_call = max(1, _LARGEST_BATCH // (n * widest))
    for start in range(0, classes, per_call):
        others = rows[start : start + per_call]
        a = rows[labels].unsqueeze(1) - others
        result[:, start : start + per_call] = lower_bound(logits, a, through, wanted)
    result.scatter_(1, labels.unsqueeze(1), torch.inf)
    return result


def _history(interval: Interval, through: bool) -> list[Interval]:
    """Return the intervals that a linear bound of this one meets on its way back."""
    found = {interval.number: interval}
    waiting = [interval]
    while waiting:
        step = waiting.pop().step
        for before in step.inputs if step is not None and (step.affine or through) else ():
            if before.number not in found:
                found[before.number] = before
                waiting.append(before)
    return list(found.values())


def lower_bound(interval: Interval, a: Tensor, through: bool,
                wanted: dict[int, list[Tensor]] | None = None) -> Tensor:
    """Return a lower bound of ``a . value`` for each row of a.

    Args:
        interval: bounds of value, (N, ...).
        a: (N, K, ...).
        through: go back through activations as well.
        wanted: as in :func:`margins`.

    Returns:
        (N, K).
    """
    total = -_rounding(interval, a)
    waiting = {interval.number: (interval, a)}
    while waiting:
        interval, a = waiting.pop(max(waiting))
        if wanted is not None and interval.number in wanted:
            wanted[interval.number].append(a)
        step = interval.step
        if step is None or not (step.affine or through):
            total = total + _minimum(interval, a)
            continue
        parts, constant = step.back(a)
        total = total + constant
        for before, part in zip(step.inputs, parts, strict=True):
            total = total - _rounding(before, part)
            if before.number in waiting:
                part = part + waiting[before.number][1]
            waiting[before.number] = (before, part)
    return total


def _rounding(interval: Interval, a: Tensor) -> Tensor:
    """Return what float64 may round: coefficients, products, their sums, and sums of parts.

    It is charged for each part before parts of one interval are added, where they may cancel.
    """
    return (a[0, 0].numel() + 256) * _DOUBLE * dot(a.abs(), interval.size)


def _minimum(interval: Interval, a: Tensor) -> Tensor:
    """Return the smallest ``a . value`` in an interval, and in its L2 ball if it has one."""
    lowest = dot(a.clamp(min=0), interval.lower) + dot(a.clamp(max=0), interval.upper)
    ball = interval.ball
    if ball is None:
        return lowest
    length = (a * ball.scale.unsqueeze(1)).flatten(2).norm(dim=2) * (1 + 1e-9)
    size = ball.center.abs() + ball.radius * ball.scale
    slack = ball.error + (a[0, 0].numel() + 256) * _DOUBLE * size
    in_ball = dot(a, ball.center) - ball.radius * length - dot(a.abs(), slack)
    return torch.maximum(lowest, in_ball)
