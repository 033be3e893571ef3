"""Carry boxes through a graph, and linear bounds back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ConversionError
from ..spec import Threat
from .boxes import Ball, Box, U, narrowed
from .flat import Flat, rule_of
from .nodes import asked, attribute, node_name
from .rules import apply
from .steps import dot

# Attackers clip to the ball in float32, which rounds eps, the sum and the bounds: the ball that is
# certified is larger by as much.
_WIDER = 4 * U
# Double's own rounding, a term.
_DOUBLE = 2.0**-52
# Coefficients of one image and one row of a linear bound that fit: 2^24 doubles are 128 MB.
_LARGEST_BATCH = 1 << 24


def around(pixels: Tensor, threat: Threat, snapped: float = 0.0, brief: bool = False) -> Box:
    """Return the box of all images that the threat allows.

    Args:
        pixels: (N, ...) within the threat's bounds.
        snapped: how far they may be, each pixel, from the images that are meant.
        brief: work in float32 from here on, where that is sound: Linf, on a CPU. (Convolutions on
            GPUs may be algorithms that nobody bounds.)
    """
    x, (low, high) = pixels.double(), threat.bounds
    slack = _WIDER * max(abs(low), abs(high), threat.eps) + snapped
    reach = threat.eps + slack
    lower, upper = (x - reach).clamp(min=low - slack), (x + reach).clamp(max=high + slack)
    if threat.norm == "linf" and brief and pixels.device.type == "cpu":
        return Box(narrowed(lower, up=False), narrowed(upper, up=True))
    if threat.norm == "linf":
        return Box(lower, upper)
    # An attacker's own sum of squares in float32 may be off, and so may each clipped pixel.
    many = x[0].numel() ** 0.5 * slack
    ball = Ball(x, torch.ones_like(x[:1]), torch.zeros_like(x[:1]),
                threat.eps * (1 + 1e-4) + many)
    return Box(lower, upper, None, ball)


def check_faithful(flat: Flat, points: Tensor, threat: Threat, answers: Tensor) -> None:
    """See that a model computes what its graph says, at some images, but for float32's rounding.

    Args:
        points: (N, ...) pixels.
        answers: (N, C) what the model itself says of them.

    Raises:
        ConversionError: it does not.
    """
    told = propagate(flat, around(points, replace(threat, eps=0.0)))
    wrong = (answers.double() < told.lower) | (answers.double() > told.upper)
    if bool(wrong.any()):
        off = float(torch.maximum(told.lower - answers, answers - told.upper).amax())
        raise ConversionError(
            "the model does not compute what its graph says",
            why=f"A logit is off by {off:.2g} more than rounding allows: the forward may branch on "
                "values, be random, keep state between calls, or run in less than float32.",
            fix="No certificate can be had for this model as it is.")


def propagate(flat: Flat, x: Box, taped: bool = False,
              seen: Callable[[fx.Node, Any], None] | None = None,
              inside: Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]] | None = None) -> Box:
    """Return the bounds of the logits.

    Args:
        x: bounds of pixels.
        taped: keep what :func:`margins` needs to go back through the whole graph.
        seen: is told every node and its value, a box or what does not depend on the image; but
            for layers that a BatchNorm alone reads: they are bounded together with it.
        inside: may narrow what a staircase is given: gets its node and arguments.

    Raises:
        ConversionError: an operation without a rule for how it is called.
    """
    values: dict[fx.Node, Any] = {}
    for node in flat.nodes:
        value = _value(flat, node, values, x, inside)
        if node.op == "output":
            break
        for box in (value,) if isinstance(value, Box) else ():
            if not taped and box.step is not None and not box.step.affine:
                box.step = None
        if seen is not None and node not in flat.normed:
            seen(node, value)
        values[node] = value
        for unread in flat.last_use[node]:
            del values[unread]
    if not isinstance(value, Box) or len(value.shape) != 2:
        said = tuple(value.shape) if isinstance(value, Box) else type(value).__name__
        raise ConversionError(f"the model returns {said} where logits (N, classes) are needed")
    return value


def _value(flat: Flat, node: fx.Node, values: dict[fx.Node, Any], x: Box,
           inside: Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]] | None) -> Any:
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    if inside is not None and flat.staircase(node) is not None and _boxes(args):
        args = inside(node, args)
    settings: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "placeholder":
        return x
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return attribute(flat.root, str(node.target))
    boxes = _boxes(args) or _boxes(settings)
    if boxes and not asked(node):
        if node in flat.normed:  # comes with its BatchNorm
            return args[0]
        rule, name = rule_of(flat, node), node_name(flat.root, node)
        if rule is None:
            raise ConversionError(f"{name} cannot be bounded", why="It has no rule.")
        return apply(rule, args, settings, name)
    if boxes:  # about a tensor, not of it
        args = fx.node.map_aggregate(args, lambda v: v.lower.float() if isinstance(v, Box) else v)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **settings)
    function: Any = flat.module(node) if node.op == "call_module" else node.target
    return function(*args, **settings)


def _boxes(values: Any) -> bool:
    found: list[Box] = []
    fx.node.map_aggregate(values, lambda v: found.append(v) if isinstance(v, Box) else None)
    return bool(found)


def margins(logits: Box, labels: Tensor, through: bool,
            wanted: dict[int, list[Tensor]] | None = None) -> Tensor:
    """Return a lower bound of each true logit minus each other one.

    The last layers are bounded together, ``(W_y - W_j) x``, instead of logit by logit.

    Args:
        logits: (N, C), with its steps.
        labels: (N,) true classes.
        through: go back through activations as well, to the pixels (CROWN); else the bounds of the
            last activations are taken.
        wanted: by number of a box, gets the coefficients that bounds have there, (N, K, ...) for
            K classes after the other.

    Returns:
        (N, C), infinity for the true class.
    """
    n, classes = logits.shape
    rows = torch.eye(classes, dtype=torch.float64, device=labels.device)
    result = logits.lower.new_full((n, classes), torch.inf, dtype=torch.float64)
    widest = max((box.lower[0].numel() for box in _history(logits, through)), default=classes)
    per_call = max(1, _LARGEST_BATCH // (n * widest))
    for first in range(0, classes, per_call):
        others = rows[first : first + per_call]
        a = rows[labels].unsqueeze(1) - others
        result[:, first : first + per_call] = lower_bound(logits, a, through, wanted)
    result.scatter_(1, labels.unsqueeze(1), torch.inf)
    return result


def _history(box: Box, through: bool) -> list[Box]:
    found = {box.number: box}
    waiting = [box]
    while waiting:
        step = waiting.pop().step
        for before in step.inputs if step is not None and (step.affine or through) else ():
            if before.number not in found:
                found[before.number] = before
                waiting.append(before)
    return list(found.values())


def lower_bound(box: Box, a: Tensor, through: bool,
                wanted: dict[int, list[Tensor]] | None = None) -> Tensor:
    """Return a lower bound of ``a . value`` for each row of a.

    Args:
        box: bounds of value, (N, ...).
        a: (N, K, ...).
        through: go back through activations as well.
        wanted: as in :func:`margins`.

    Returns:
        (N, K).
    """
    total = -_rounded(box, a)
    waiting = {box.number: (box, a)}
    while waiting:
        box, a = waiting.pop(max(waiting))
        if wanted is not None and box.number in wanted:
            wanted[box.number].append(a)
        step = box.step
        if step is None or not (step.affine or through):
            total = total + _lowest(box, a)
            continue
        parts, constant = step.back(a)
        total = total + constant
        for before, part in zip(step.inputs, parts, strict=True):
            total = total - _rounded(before, part)
            if before.number in waiting:
                part = part + waiting[before.number][1]
            waiting[before.number] = (before, part)
    return total


def _rounded(box: Box, a: Tensor) -> Tensor:
    """Return what double may round around coefficients: products, their sums, sums of parts.

    It is charged for each part before parts of one box come together, where they may cancel.
    """
    return (a[0, 0].numel() + 256) * _DOUBLE * dot(a.abs(), box.size)


def _lowest(box: Box, a: Tensor) -> Tensor:
    """Return the smallest ``a . value`` in a box, or in the part of an L2 ball that is in it."""
    lowest = dot(a.clamp(min=0), box.lower) + dot(a.clamp(max=0), box.upper)
    ball = box.ball
    if ball is None:
        return lowest
    length = (a * ball.scale.unsqueeze(1)).flatten(2).norm(dim=2) * (1 + 1e-9)
    size = ball.center.abs() + ball.radius * ball.scale
    slack = ball.error + (a[0, 0].numel() + 256) * _DOUBLE * size
    inside = dot(a, ball.center) - ball.radius * length - dot(a.abs(), slack)
    return torch.maximum(lowest, inside)
