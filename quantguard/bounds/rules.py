"""Literal tables from what a graph calls to the rule that bounds it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import QuantActivation
from ..errors import ConversionError
from ..kinds import FUNCTION_KINDS, METHOD_KINDS, MODULE_KINDS, module_of
from . import arithmetic as num
from . import shapes as form
from .arithmetic import NoRule, weights
from .boxes import Box
from .curves import Curve, activated, curved, prelu, quantized


def _clamp(x: Box, min: Any = None, max: Any = None) -> Box:
    low = -math.inf if min is None else min
    high = math.inf if max is None else max
    if not all(isinstance(v, (int, float)) for v in (low, high)) or low > high:
        raise NoRule("bounds that are no numbers, or in the wrong order")
    if (low, high) == (0, math.inf):
        return activated(nn.ReLU(), x)
    corners = tuple((float(v), float(v)) for v in (low, high) if math.isfinite(v))
    return curved(lambda z: z.clamp(low, high), Curve(corners, straight=True), x)


def _activation(kind: str) -> Callable[..., Box]:
    def rule(x: Box, *args: Any, **settings: Any) -> Box:
        module = module_of(kind, (x, *args), settings, (Box, Tensor))
        if module is None:
            raise NoRule("settings that are not known beforehand")
        return activated(module.eval(), x)
    return rule


def _prelu(x: Box, weight: Any) -> Box:
    return prelu(x, weights(weight))


def _settings(m: Any, names: str) -> dict[str, Any]:
    return {name: getattr(m, name) for name in names.split()}


_MAX = "kernel_size stride padding dilation ceil_mode return_indices"
_AVERAGE = "kernel_size stride padding ceil_mode count_include_pad"
_NORM = "running_mean running_var weight bias eps"
_max_pools = {d: form.max_pool(d, "max_pool") for d in (1, 2)}
_adaptive_max_pools = {d: form.max_pool(d, "adaptive_max_pool") for d in (1, 2)}
_average_pools = {d: form.average_pool(d) for d in (1, 2)}
_adaptive_average_pools = {d: form.adaptive_average(d) for d in (1, 2)}
_convolutions = {d: num.convolution(d) for d in (1, 2, 3)}

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# type of a leaf module -> rule(module, inputs...). Exact types: a subclass may compute otherwise.
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    QuantActivation: quantized,
    **dict.fromkeys(LAYERS, num.layer),
    **dict.fromkeys(NORMS, lambda m, x: num.batch_norm(x, **_settings(m, _NORM))),
    nn.MaxPool1d: lambda m, x: _max_pools[1](x, **_settings(m, _MAX)),
    nn.MaxPool2d: lambda m, x: _max_pools[2](x, **_settings(m, _MAX)),
    nn.AdaptiveMaxPool1d: lambda m, x: _adaptive_max_pools[1](
        x, **_settings(m, "output_size return_indices")),
    nn.AdaptiveMaxPool2d: lambda m, x: _adaptive_max_pools[2](
        x, **_settings(m, "output_size return_indices")),
    nn.AvgPool1d: lambda m, x: _average_pools[1](x, **_settings(m, _AVERAGE)),
    nn.AvgPool2d: lambda m, x: _average_pools[2](
        x, **_settings(m, f"{_AVERAGE} divisor_override")),
    nn.AdaptiveAvgPool1d: lambda m, x: _adaptive_average_pools[1](x, m.output_size),
    nn.AdaptiveAvgPool2d: lambda m, x: _adaptive_average_pools[2](x, m.output_size),
    nn.Flatten: lambda m, x: form.flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m, x: form.reshaped(
        x, lambda v: torch.unflatten(v, m.dim, m.unflattened_size)),
    nn.ZeroPad2d: lambda m, x: form.pad(x, m.padding),
    nn.PReLU: lambda m, x: _prelu(x, m.weight),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
                     nn.AlphaDropout, nn.FeatureAlphaDropout), lambda m, x: x),
    **dict.fromkeys([cls for cls in MODULE_KINDS if cls not in (nn.GLU, nn.Softmax)], activated),
}

# function -> rule
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: num.add, operator.iadd: num.add, torch.add: num.add,
    operator.sub: num.sub, operator.isub: num.sub, torch.sub: num.sub,
    operator.mul: num.mul, operator.imul: num.mul, torch.mul: num.mul,
    operator.truediv: num.div, operator.itruediv: num.div, torch.div: num.div,
    operator.neg: num.neg, torch.neg: num.neg, torch.mean: num.mean, torch.sum: num.total,
    F.linear: num.linear, F.batch_norm: num.batch_norm,
    F.conv1d: _convolutions[1], F.conv2d: _convolutions[2], F.conv3d: _convolutions[3],
    F.max_pool1d: _max_pools[1], torch.max_pool1d: _max_pools[1],
    F.max_pool2d: _max_pools[2], torch.max_pool2d: _max_pools[2],
    F.adaptive_max_pool1d: _adaptive_max_pools[1], F.adaptive_max_pool2d: _adaptive_max_pools[2],
    F.avg_pool1d: _average_pools[1], F.avg_pool2d: _average_pools[2],
    F.adaptive_avg_pool1d: _adaptive_average_pools[1],
    F.adaptive_avg_pool2d: _adaptive_average_pools[2],
    torch.amax: form.extreme(torch.amax), torch.amin: form.extreme(torch.amin),
    operator.getitem: form.item, torch.flatten: form.flatten, torch.reshape: form.view,
    torch.permute: form.permute, torch.transpose: form.transpose, torch.squeeze: form.squeeze,
    torch.unsqueeze: form.unsqueeze, torch.cat: form.cat, torch.concat: form.cat,
    torch.split: form.split, torch.chunk: form.chunk, F.pad: form.pad,
    F.dropout: form.dropout, F.dropout2d: form.dropout,
    torch.clamp: _clamp, F.prelu: _prelu, torch.prelu: _prelu,
    **{f: _activation(kind) for f, kind in FUNCTION_KINDS.items()
       if kind not in ("glu", "softmax", "attention", "prelu", "rrelu")},
}

# full name of a function that torch.fx is told not to look into -> rule
WRAPPED: dict[str, Callable[..., Any]] = {
    "torchvision.ops.stochastic_depth.stochastic_depth": form.stochastic_depth,
}

# name of a method of Tensor -> rule
METHODS: dict[str, Callable[..., Any]] = {
    "add": num.add, "add_": num.add, "sub": num.sub, "sub_": num.sub, "mul": num.mul,
    "mul_": num.mul, "div": num.div, "div_": num.div, "neg": num.neg, "mean": num.mean,
    "sum": num.total, "amax": form.extreme(torch.amax), "amin": form.extreme(torch.amin),
    "flatten": form.flatten, "view": form.view, "reshape": form.view, "permute": form.permute,
    "transpose": form.transpose, "squeeze": form.squeeze, "unsqueeze": form.unsqueeze,
    "split": form.split, "chunk": form.chunk, "contiguous": form.as_it_is,
    "detach": form.as_it_is, "clone": form.as_it_is, "float": form.as_it_is, "to": form.to,
    "clamp": _clamp, "clamp_": _clamp, "prelu": _prelu,
    **{name: _activation(kind) for name, kind in METHOD_KINDS.items()
       if kind not in ("softmax", "prelu")},
}


def apply(rule: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any],
          where: str) -> Any:
    """Call a rule; what it cannot do is one error that says where.

    Raises:
        ConversionError: the rule does not cover this call.
    """
    try:
        return rule(*args, **settings)
    except (NoRule, TypeError, RuntimeError, ValueError, IndexError, AttributeError,
            AssertionError) as error:
        raise ConversionError(f"{where} cannot be bounded",
                              why=str(error).strip().splitlines()[0] if str(error) else "",
                              fix="See quantguard.certify for the operations that can.") from error
    except ConversionError as error:
        raise ConversionError(f"{where} cannot be bounded", why=error.what,
                              fix=error.fix) from None
