"""Propagation of intervals through a model in training: fast, differentiable, in float32.

It goes through the same graph as a certificate (:mod:`quantguard.certification.graph`), with the
same rules in real numbers: nothing is added for rounding, so it serves training and validation and
proves nothing. This is interval bound propagation as in Gowal et al. 2018, arXiv:1810.12715,
section 3. Through a quantizer it is exact, ``[q(l), q(u)]``, and both ends take the quantizer's own
surrogate gradient. With ``ramp`` and equal gaps that is one slope from half a gap below the first
threshold to half a gap above the last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..core.errors import ConversionError
from ..core.specs import Threat
from .graph.graph import ModelGraph, model_graph
from .graph.interpreter import IntervalInterpreter
from .graph.nodes import node_name, rule_for
from .rules.registry import apply_training
from .rules.training import TrainInterval, between

# The largest tensor of differences between rows of the last layer's weights; beyond that size the
# logits' own intervals are used, which are wider.
_PAIRS = 1 << 24


def around(pixels: Tensor, eps: float, bounds: tuple[float, float]) -> TrainInterval:
    """Return the Linf ball of radius eps, clipped to bounds."""
    return between((pixels - eps).clamp(min=bounds[0]), (pixels + eps).clamp(max=bounds[1]))


def graph_of(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> ModelGraph:
    """Return the graph of a model as it runs in eval mode, over the model's own parameters.

    Args:
        model: is not changed; later changes of its parameters and modes show in the graph.
        threat, key, pixels: as in :func:`quantguard.certification.graph.graph.model_graph`.

    Raises:
        ConversionError: as :func:`quantguard.certification.graph.graph.model_graph`.
    """
    graph = model_graph(model, threat, key, pixels)
    graph.root._modules["model"] = model  # replaces the copy; names in the graph are the same
    return graph


def propagate(graph: ModelGraph, x: TrainInterval) -> TrainInterval:
    """Return the intervals of the logits; BatchNorm layers in training mode read the centers.

    Raises:
        ConversionError: an operation without a rule for how it is called.
    """
    logits = _Intervals(graph).run(x)
    if not isinstance(logits, TrainInterval) or logits.center.dim() != 2:
        raise ConversionError("the model does not return logits (N, classes)")
    return logits


class _Intervals(IntervalInterpreter[TrainInterval]):
    """A run of a graph on centers and radii."""

    interval = TrainInterval

    def bound(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = rule_for(self.graph.root, node)
        call: Any = self.graph.module(node) if node.op == "call_module" else \
            functools.partial(self.call, node)
        return apply_training("it has no rule" if rule is None else rule.training, call, args,
                              kwargs, node_name(self.graph.root, node))

    def plain(self, value: TrainInterval) -> Tensor:
        return value.center


def worst_case(logits: TrainInterval, labels: Tensor) -> Tensor:
    """Return the largest possible value of each logit minus the true one, (N, C); 0 for the true.

    The last linear layer is bounded together, ``(W_j - W_y) x``, where it is not too large.
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
