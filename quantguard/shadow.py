"""What a spelled-out activation computes: arithmetic on one value, run along on a small grid.

``x * (x > 0)``, ``x.clamp(min=0)``, ``relu6(x + 3) / 6``, ``x * sigmoid(x)`` call no activation,
or one that is only a part. Each pointwise operation is carried out on a grid of numbers in place
of its input, for every earlier value that it may be a function of; a function that agrees with an
activation on the grid is that activation, however it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# -10 to 10 in quarters: kinks at whole numbers are on it.
GRID = torch.linspace(-10, 10, 81, dtype=torch.float64)
# How near a spelling comes on the grid: the two GELUs are 4e-4 apart, written-out constants are
# rounded; a clamp at 1e-6 is a guard against 0 and no ReLU.
_TOLERANCE = {"gelu": 1e-3, "quick_gelu": 1e-3, "relu": 1e-9, "relu6": 1e-9, "hardtanh": 1e-9}
_ROOTS = 12  # earlier values that a result is followed back to

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
# Larger of a value and a learned bound, as in the thresholded linear unit (arXiv:1911.09737).
_BOUNDS = frozenset(("max", "maximum", "clamp", "clamp_min"))
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])
_FULL = frozenset(("full", "full_like", "new_full"))
_ONES = frozenset(["ones", "ones_like", "new_ones"])

_TARGETS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU(), torch.relu),
    "relu6": (nn.ReLU6(), F.relu6),
    "hardtanh": (nn.Hardtanh(), F.hardtanh),
    "elu": (nn.ELU(), F.elu),
    "selu": (nn.SELU(), F.selu),
    "gelu": (nn.GELU(), F.gelu),
    "silu": (nn.SiLU(), F.silu),
    "quick_gelu": (nn.GELU(), lambda x: x * torch.sigmoid(1.702 * x)),
    "mish": (nn.Mish(), F.mish),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "hard_mish": (nn.Mish(), lambda x: 0.5 * x * (x + 2).clamp(0, 2)),
    "softplus": (nn.Softplus(), F.softplus),
    "softsign": (nn.Softsign(), F.softsign),
    "tanh": (nn.Tanh(), torch.tanh),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "hardsigmoid": (nn.Hardsigmoid(), F.hardsigmoid),
}
_VALUES = torch.stack([f(GRID) for _, f in _TARGETS.values()])


def operation(function: Any) -> str:
    """Return the plain name of an operation: ``mul`` for ``__rmul__``, ``mul_``, operator.imul."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    name = name.partition(".")[0].strip("_")  # aten operators have their overload's name, too
    if name not in _POINTWISE and name[:1] in ("r", "i") and name[1:] in _POINTWISE:
        return str(name[1:])
    return str(name)


def recognise(values: Tensor) -> tuple[str, nn.Module] | None:
    """Return kind and module of the activation that takes these values on the grid."""
    if values.dtype is not torch.float64:
        return None
    distance = (_VALUES - values).abs().amax(1)
    best = int(distance.argmin())
    kind = list(_TARGETS)[best]
    if float(distance[best]) < _TOLERANCE.get(kind, 1e-4):
        return kind, _TARGETS[kind][0]
    below, above = values[:40], values[41:]
    slope = float(values[0] / GRID[0])
    if 0 < slope < 0.99 and torch.allclose(above, GRID[41:]) and \
            torch.allclose(below, slope * GRID[:40]):
        return "leaky_relu", nn.LeakyReLU(slope)
    # x sigmoid(b x): the logit of what x is multiplied by is linear
    share = values / GRID
    near = torch.cat([share[32:40], share[41:49]])
    if bool(((near > 0) & (near < 1)).all()):
        rate = torch.logit(near) / torch.cat([GRID[32:40], GRID[41:49]])
        if float(rate.min()) > 0.1 and float(rate.max() - rate.min()) < 1e-3:
            return "silu", nn.SiLU()
    return None


class Learned(float):
    """Stand for a learned tensor: one number where it scales, none where it bounds."""


class Shadow(NamedTuple):
    """Hold what a value is as a function of an earlier one: on the grid, and through which."""

    values: Tensor
    through: frozenset[int]
    known: tuple[str, nn.Module] | None = None


class Spelled(NamedTuple):
    """Say that a result is an activation of an earlier value.

    Attributes:
        kind: which.
        function: the same as a module.
        root: number of the value that it is a function of.
        through: numbers of the values between the two.
    """

    kind: str
    function: nn.Module
    root: int
    through: frozenset[int]


class Shadows:
    """Follow values, named by hashable keys, through pointwise operations.

    Args:
        table: where values are kept: any mapping of keys.
    """

    def __init__(self, table: Any) -> None:
        self._table: Any = table
        self._numbers = count()

    def number(self, key: Hashable) -> int:
        """Return the number of a value, which is followed from here on if it was not before."""
        if key not in self._table:
            self._table[key] = next(self._numbers), {}
        return int(self._table[key][0])

    def constant(self, key: Hashable, value: float) -> None:
        """Note that a value is one number everywhere."""
        self._table[key] = value

    def is_constant(self, key: Hashable) -> bool:
        """Return whether a value is known to be one number everywhere."""
        return isinstance(self._table.get(key), float)

    def note(self, key: Hashable, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
             is_value: Callable[[Any], bool]) -> Spelled | None:
        """Note that ``key = function(*args, **kwargs)``; say whether that is an activation.

        Args:
            function: a function, a method's name, or an activation module.
            is_value: tells the keys among the arguments from plain values.
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
                continue  # another value mixes in
            through = frozenset().union(*(s.through for s in roots[root])) | {number}
            result = self._carry_out(function, name, args, kwargs, root, before, is_value)
            if result is not None:
                shadows[root] = Shadow(result, through, recognise(result))
        if not shadows:
            return None
        self._table[key] = number, shadows
        for root in sorted(shadows, reverse=True):
            found = shadows[root].known
            # Times one, cast, clamped once more, it is the activation that it was.
            if found is not None and all(s.known is None or s.known[0] != found[0]
                                         for s in roots[root]):
                if learned:  # it does not end at 0: nothing that q could absorb
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
        except Exception:  # an operation that the grid cannot stand in for
            return None
        if not isinstance(result, Tensor) or result.shape != GRID.shape:
            return None
        return result


def number_of(value: Tensor) -> float:
    """Return the number that a constant tensor stands for."""
    if value.is_meta or value.numel() != 1:
        return Learned(1.0)
    return float(value.detach())


class TensorShadows(Shadows):
    """Follow tensors while a model runs; those that are gone are forgotten."""

    def __init__(self) -> None:
        super().__init__(WeakIdKeyDictionary())

    def ran(self, result: Tensor, function: Any, args: tuple[Any, ...],
            kwargs: dict[str, Any]) -> Spelled | None:
        """Note that ``result = function(*args, **kwargs)`` has run; see :meth:`note`."""
        for value in (*args, *kwargs.values()):
            # A learned slope or sharpness: whatever it is now, the form is the same.
            if isinstance(value, Tensor) and not self.is_constant(value) and (
                    isinstance(value, nn.Parameter) or (value.dim() == 0 and not value.is_meta)):
                self.constant(value, number_of(value))
        return self.note(result, function, args, kwargs, lambda value: isinstance(value, Tensor))
