"""Intervals through a model that is being trained: fast, differentiable, in float32.

The same graph that a certificate goes through (:mod:`quantguard.bounds`), and the same rules in
real numbers: nothing is added for rounding, so this trains and probes; it proves nothing. Interval
bound propagation as in Gowal et al. 2018, arXiv:1810.12715, section 3; through a staircase it is
exact, ``[q(l), q(u)]``, and both ends take the staircase's own surrogate gradient. With ``ramp``
and equal gaps that is one slope from half a gap below the first threshold to half a gap above the
last.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .bounds.flat import Flat, flattened
from .bounds.nodes import asked, node_name
from .errors import ConversionError
from .interval_rules import (
    FUNCTIONS,
    METHODS,
    MODULES,
    Interval,
    alike,
    between,
    holds_intervals,
    part,
)
from .spec import Threat

# Differences of rows of the last layer's weights that are worked out; beyond it the logits' own
# intervals are taken, which are wider.
_PAIRS = 1 << 24


def around(pixels: Tensor, eps: float, bounds: tuple[float, float]) -> Interval:
    """Return the Linf ball of radius eps, as far as it lies within bounds."""
    return between((pixels - eps).clamp(min=bounds[0]), (pixels + eps).clamp(max=bounds[1]))


def graph_of(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> Flat:
    """Return the graph of a model as it runs in eval mode, over the model's own parameters.

    Args:
        model: is not touched; what is trained later is seen by the graph, its modes, too.
        threat, key, pixels: as in :func:`quantguard.bounds.flattened`.

    Raises:
        ConversionError: as :func:`quantguard.bounds.flattened`.
    """
    flat = flattened(model, threat, key, pixels)
    flat.root._modules["model"] = model  # instead of the copy; names in the graph are the same
    return flat


def propagate(flat: Flat, x: Interval) -> Interval:
    """Return the intervals of the logits; BatchNorms in training mode see the centers.

    Raises:
        ConversionError: an operation without a rule for how it is called.
    """
    values: dict[fx.Node, Any] = {}
    for node in flat.nodes:
        value = _value(flat, node, values, x)
        if node.op == "output":
            break
        values[node] = value
        for unread in flat.last_use[node]:
            del values[unread]
    if not isinstance(value, Interval) or value.center.dim() != 2:
        raise ConversionError("the model does not return logits (N, classes)")
    return value


def worst_case(logits: Interval, labels: Tensor) -> Tensor:
    """Return the largest that each logit minus the true one can be, (N, C); 0 for the true one.

    The last linear layer is taken together, ``(W_j - W_y) x``, where it is not too large.
    """
    rows = labels.unsqueeze(1)
    center = logits.center - logits.center.gather(1, rows)
    classes = logits.center.shape[1]
    if logits.last is None or classes * logits.last[0].numel() > _PAIRS:
        reach = logits.radius + logits.radius.gather(1, rows)
        return (center + reach).scatter(1, rows, 0.0)
    weight, x = logits.last
    pairs = (weight.unsqueeze(0) - weight.unsqueeze(1)).abs().flatten(0, 1)  # (C * C, features)
    reach = F.linear(x.radius, pairs).view(-1, classes, classes)
    return center + reach[torch.arange(len(labels), device=labels.device), labels]


def _value(flat: Flat, node: fx.Node, values: dict[fx.Node, Any], x: Interval) -> Any:
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    settings: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "placeholder":
        return x
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(flat.root)
    call, rule = _call_and_rule(flat, node)
    if not holds_intervals(args, settings) or asked(node):
        return call(*part("center", args), **part("center", settings))
    try:
        if rule is None:
            raise ConversionError("it has no rule")
        return rule(call, *args, **settings)
    except (ConversionError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        said = error.what if isinstance(error, ConversionError) else str(error)
        raise ConversionError(f"{node_name(flat.root, node)} has no intervals to train through",
                              why=said.strip().splitlines()[0] if said.strip() else "") from error


def _call_and_rule(flat: Flat, node: fx.Node) -> tuple[Callable[..., Any],
                                                       Callable[..., Any] | None]:
    """Return what a node calls, and the rule that takes this and the node's arguments."""
    if node.op == "call_module":
        module = flat.module(node)
        return module, MODULES.get(type(module))
    if node.op == "call_method":
        name = str(node.target)
        return (lambda x, *args, **settings: getattr(x, name)(*args, **settings)), METHODS.get(name)
    target: Any = node.target
    name = getattr(target, "__name__", "")
    return target, FUNCTIONS.get(target) or (alike if name == "stochastic_depth" else None)
