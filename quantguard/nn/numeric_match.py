"""Activations written as arithmetic, found by their values on a small grid.

``x * (x > 0)``, ``x.clamp(min=0)``, ``relu6(x + 3) / 6`` and ``x * sigmoid(x)`` call no activation,
or one that is only a part of the function. Each pointwise operation is therefore repeated on a grid
of numbers, once for every earlier value that its result may be a function of. A function with the
values of an activation on the grid is that activation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .activation_grid import GRID, recognise

_ROOTS = 12  # earlier values that a result may be a function of
_POINTWISE = frozenset((
    "add", "sub", "rsub", "mul", "div", "truediv", "true_divide", "divide", "multiply", "subtract",
    "neg", "negative", "pow", "square", "sqrt", "rsqrt", "exp", "log", "log1p", "expm1", "sigmoid",
    "tanh", "erf", "relu", "relu6", "clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum",
    "max", "min", "abs", "absolute", "gt", "ge", "lt", "le", "where", "masked_fill", "softplus",
    "logsigmoid", "hardsigmoid", "hardtanh", "hardswish", "sign", "sgn", "heaviside", "reciprocal",
    "threshold", "logaddexp", "silu", "leaky_relu", "elu", "invert", "logical_not", "bitwise_not",
    "expit", "special_expit"))
_CASTS = frozenset((
    "float", "double", "half", "bfloat16", "to", "type", "type_as", "contiguous", "clone",
    "detach"))
_VIEWS = frozenset(("view", "reshape", "unsqueeze", "expand", "expand_as", "view_as"))
# Maximum of a value and a learned bound, as in the thresholded linear unit (arXiv:1911.09737).
_BOUNDS = frozenset(("max", "maximum", "clamp", "clamp_min"))
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])
_FULL = frozenset(("full", "full_like", "new_full"))
_ONES = frozenset(["ones", "ones_like", "new_ones"])


def operation(function: Any) -> str:
    """Return the name of an operation: ``mul`` for ``__rmul__``, ``mul_`` and operator.imul."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    name = name.partition(".")[0].strip("_")  # aten operators add the overload
    if name not in _POINTWISE and name[:1] in ("r", "i") and name[1:] in _POINTWISE:
        return str(name[1:])
    return str(name)


class Learned(float):
    """Placeholder for a learned tensor: one number as a factor, unknown as a bound."""


class Shadow(NamedTuple):
    """A value as a function of an earlier one: its values on the grid, the numbers in between."""

    values: Tensor
    through: frozenset[int]
    known: tuple[str, nn.Module] | None = None


class Spelled(NamedTuple):
    """An activation that a model writes as arithmetic.

    Attributes:
        kind: of the activation.
        function: the activation as a module.
        root: number of the value that the result is a function of.
        through: numbers of the values between the two.
    """

    kind: str
    function: nn.Module
    root: int
    through: frozenset[int]


class Shadows:
    """Record of values, named by hashable keys, through pointwise operations.

    Args:
        table: a mutable mapping, in which the values are stored by key.
    """

    def __init__(self, table: Any) -> None:
        self._table: Any = table
        self._numbers = count()

    def number(self, key: Hashable) -> int:
        """Return the number of a value; one that is not recorded yet is recorded as an input."""
        if key not in self._table:
            self._table[key] = next(self._numbers), {}
        return int(self._table[key][0])

    def constant(self, key: Hashable, value: float) -> None:
        """Record that all elements of a value are one number."""
        self._table[key] = value

    def is_constant(self, key: Hashable) -> bool:
        """Return whether all elements of a value are known to be one number."""
        return isinstance(self._table.get(key), float)

    def note(self, key: Hashable, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
             is_value: Callable[[Any], bool]) -> Spelled | None:
        """Record that ``key = function(*args, **kwargs)``; return the activation it completes.

        Args:
            key: of the result.
            function: a function, a method's name, or an activation module.
            args: positional arguments, in which values are named by their keys.
            kwargs: keyword arguments.
            is_value: whether an argument is a key, not a plain value.
        """
        module = isinstance(function, nn.Module)
        name = "" if module else operation(function)
        if name in _ZEROS or name in _ONES:
            self.constant(key, float(name in _ONES))
            return None
        if name in _FULL:
            number = kwargs.get("fill_value", args[-1] if args else None)
            if isinstance(number, (int, float)):
                self.constant(key, float(number))
            return None
        if args and name in (*_VIEWS, *_CASTS) and is_value(args[0]) and self.is_constant(args[0]):
            self.constant(key, self._table[args[0]])
            return None
        if not module and name not in _POINTWISE and name not in _CASTS:
            return None
        if name in _CASTS:
            args, kwargs = args[:1], {}
        inputs = [a for a in (*args, *kwargs.values()) if is_value(a)]
        before = {a: self._table[a] for a in inputs if self.is_constant(a)}
        learned = name in _BOUNDS and any(isinstance(v, Learned) for v in before.values())
        if learned:
            before = {a: 0.0 if isinstance(v, Learned) else v for a, v in before.items()}
        values = [a for a in inputs if a not in before]
        roots: dict[int, list[Shadow]] = {}
        for a in values:
            own = self.number(a)
            for root, shadow in [*self._table[a][1].items(), (own, Shadow(GRID, frozenset()))]:
                roots.setdefault(root, []).append(shadow)
        shadows: dict[int, Shadow] = {}
        number = next(self._numbers)
        for root in sorted(roots)[-_ROOTS:]:
            if len(roots[root]) < len(values):
                continue  # an input is not a function of this root
            through = frozenset().union(*(s.through for s in roots[root])) | {number}
            result = self._carry_out(function, name, args, kwargs, root, before, is_value)
            if result is not None:
                shadows[root] = Shadow(result, through, recognise(result))
        if not shadows:
            return None
        self._table[key] = number, shadows
        for root in sorted(shadows, reverse=True):
            found = shadows[root].known
            # An activation times one, cast or clamped again, is not a new one.
            if found is not None and all(s.known is None or s.known[0] != found[0]
                                         for s in roots[root]):
                if learned:  # its lower end is not 0: q cannot absorb it
                    found = "tlu", nn.Identity()
                return Spelled(*found, root, shadows[root].through - {number})
        return None

    def _carry_out(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any],
                   root: int, before: dict[Any, float],
                   is_value: Callable[[Any], bool]) -> Tensor | None:
        def on_grid(a: Any) -> Any:
            if not is_value(a):
                return a
            if a in before:
                return torch.full_like(GRID, before[a])
            number, shadows = self._table[a]
            return GRID.clone() if number == root else shadows[root].values.clone()

        try:
            values = [on_grid(a) for a in args]
            if name in _CASTS and isinstance(values[0], Tensor):
                return values[0] if values[0].dtype is torch.bool else values[0].double()
            if isinstance(function, str):
                function = getattr(torch.Tensor, function)
            result: object = function(*values, **{k: on_grid(v) for k, v in kwargs.items()})
        except Exception:  # an operation that does not run on the grid
            return None
        if not isinstance(result, Tensor) or result.shape != GRID.shape:
            return None
        return result


def number_of(value: Tensor) -> float:
    """Return a constant tensor as a number."""
    if value.is_meta or value.numel() != 1:
        return Learned(1.0)
    return float(value.detach())


class TensorShadows(Shadows):
    """Record of the tensors of a running model; entries go with their tensors."""

    def __init__(self) -> None:
        super().__init__(WeakIdKeyDictionary())

    def ran(self, result: Tensor, function: Any, args: tuple[Any, ...],
            kwargs: dict[str, Any]) -> Spelled | None:
        """Record that ``result = function(*args, **kwargs)`` has run; see :meth:`note`."""
        for value in (*args, *kwargs.values()):
            # A learned slope or sharpness: its value does not change the form.
            if isinstance(value, Tensor) and not self.is_constant(value) and (
                    isinstance(value, nn.Parameter) or (value.dim() == 0 and not value.is_meta)):
                self.constant(value, number_of(value))
        return self.note(result, function, args, kwargs, lambda value: isinstance(value, Tensor))
