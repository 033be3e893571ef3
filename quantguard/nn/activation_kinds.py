"""Table of activation functions: the module, functions and methods of each kind.

To add an activation, add a row to ``_KINDS``. A kind that must stay in float also belongs in
``ALWAYS_EXCLUDED``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# kind -> (module class, functions, method names)
_KINDS: dict[str, tuple[type[nn.Module], tuple[Callable[..., Any], ...], tuple[str, ...]]] = {
    "relu": (nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "relu6": (nn.ReLU6, (F.relu6,), ()),
    "leaky_relu": (nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), ()),
    "prelu": (nn.PReLU, (F.prelu, torch.prelu), ("prelu",)),
    "rrelu": (nn.RReLU, (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), ()),
    "threshold": (nn.Threshold, (F.threshold, torch.threshold, torch.threshold_), ()),
    "elu": (nn.ELU, (F.elu, F.elu_), ()),
    "selu": (nn.SELU, (F.selu, F.selu_, torch.selu, torch.selu_), ()),
    "celu": (nn.CELU, (F.celu, F.celu_, torch.celu, torch.celu_), ()),
    "gelu": (nn.GELU, (F.gelu,), ()),
    "silu": (nn.SiLU, (F.silu,), ()),
    "mish": (nn.Mish, (F.mish,), ()),
    "hardswish": (nn.Hardswish, (F.hardswish,), ()),
    "hardtanh": (nn.Hardtanh, (F.hardtanh, F.hardtanh_), ()),
    "softplus": (nn.Softplus, (F.softplus,), ()),
    "softsign": (nn.Softsign, (F.softsign,), ()),
    "log_sigmoid": (nn.LogSigmoid, (F.logsigmoid,), ()),
    "hardshrink": (nn.Hardshrink, (F.hardshrink, torch.hardshrink), ("hardshrink",)),
    "softshrink": (nn.Softshrink, (F.softshrink,), ()),
    "tanhshrink": (nn.Tanhshrink, (F.tanhshrink,), ()),
    "tanh": (nn.Tanh, (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
    "sigmoid": (nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit),
                ("sigmoid", "sigmoid_")),
    "hardsigmoid": (nn.Hardsigmoid, (F.hardsigmoid,), ()),
    "glu": (nn.GLU, (F.glu,), ()),
    "softmax": (nn.Softmax, (F.softmax, torch.softmax), ("softmax",)),
    "attention": (nn.MultiheadAttention, (F.scaled_dot_product_attention,), ()),
}
GATES = ("sigmoid", "hardsigmoid")
ALWAYS_EXCLUDED = {"glu": "gate", "softmax": "attention softmax", "attention": "attention softmax"}
"""kind -> the reason for which its calls are never converted."""
_COORDINATES = "torchvision/ops/boxes.py:"

# PReLU has a parameter and attention has children: the calls in their forwards count instead.
MODULE_KINDS = {row[0]: kind for kind, row in _KINDS.items() if kind not in ("prelu", "attention")}
FUNCTION_KINDS = {f: kind for kind, row in _KINDS.items() for f in row[1]}
METHOD_KINDS = {name: kind for kind, row in _KINDS.items() for name in row[2]}
# Position of ``inplace`` among the arguments of a function.
_INPLACE = {"relu": 1, "relu6": 1, "leaky_relu": 2, "rrelu": 4, "threshold": 3, "elu": 2, "selu": 1,
            "celu": 2, "silu": 1, "mish": 1, "hardswish": 1, "hardtanh": 3, "hardsigmoid": 1}
# Python's operators that have an in-place form.
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")


def always_excluded(kind: str, where: str) -> str:
    """Return why a call of a kind at a place in the source is never converted, or an empty string.

    Box coordinates clipped to the image count among these: four levels would destroy them.
    """
    return ALWAYS_EXCLUDED.get(kind) or (
        "box coordinates" if where.startswith(_COORDINATES) else ""
    )


def kind_of(function: Any) -> str | None:
    """Return the kind of a function, a method of Tensor or a method's name; None: no activation."""
    if isinstance(function, str):
        return METHOD_KINDS.get(function)
    try:
        kind = FUNCTION_KINDS.get(function)
    except TypeError:  # not hashable, such as a dict
        return None
    if kind is None and getattr(function, "__objclass__", None) is torch._C.TensorBase:
        kind = METHOD_KINDS.get(function.__name__)
    return kind


def function_of(kind: str) -> Callable[..., Any]:
    """Return the function that computes a kind."""
    return _KINDS[kind][1][0]


def module_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any],
              variable: type | tuple[type, ...]) -> nn.Module | None:
    """Return the activation that a function or method call computes as a module.

    Args:
        kind: a kind that is converted.
        args: positional arguments of the call; the first is the input.
        kwargs: keyword arguments of the call.
        variable: types of the arguments whose values are not known in advance.

    Returns:
        None where the value of an argument is not known in advance, or for a PReLU.
    """
    cls = _KINDS[kind][0]
    names = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    values = dict(zip(names, args[1:], strict=False)) | {
        k: v for k, v in kwargs.items() if k in names}
    if kind == "prelu" or any(isinstance(v, variable) for v in values.values()):
        return None
    return cls(**values)


def overwrites(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a function or method call writes its result into its input."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name.startswith("__"):  # the method behind an operator
        return name.startswith("__i")
    position = _INPLACE.get(name, 99)
    flag = args[position] if len(args) > position else kwargs.get("inplace", False)
    return name.endswith("_") or bool(flag) or (name[:1] == "i" and name[1:] in _OPERATORS)


def described(function: nn.Module) -> list[Any]:
    """Return a float activation as plain values: its kind and settings; see :func:`rebuilt`."""
    constants: Any = getattr(function, "__constants__", [])
    # ReLU6 inherits the constants of Hardtanh, and its __init__ takes none of them.
    taken = inspect.signature(type(function).__init__).parameters
    return [MODULE_KINDS.get(type(function), ""), {
        name: getattr(function, name) for name in constants if name != "inplace" and name in taken}]


def rebuilt(values: list[Any]) -> nn.Module:
    """Return the activation that :func:`described` has described."""
    kind, settings = values
    return _KINDS[kind][0](**settings) if kind else nn.Identity()
