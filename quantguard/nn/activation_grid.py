"""Activations by their values on a grid of numbers.

To add an activation that models write out as arithmetic, add a row to ``_TARGETS``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -10 to 10 in steps of 1/4, so that kinks at integers are on the grid.
GRID = torch.linspace(-10, 10, 81, dtype=torch.float64)
# Largest deviation on the grid. The two forms of GELU are 4e-4 apart, and constants in source code
# are rounded. A clamp at 1e-6 guards against 0 and is not a ReLU.
_TOLERANCE = {"gelu": 1e-3, "quick_gelu": 1e-3, "relu": 1e-9, "relu6": 1e-9, "hardtanh": 1e-9}
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


def recognise(values: Tensor) -> tuple[str, nn.Module] | None:
    """Return kind and module of the activation with these values on the grid, if there is one."""
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
    # x sigmoid(b x): the logit of the factor of x is linear.
    share = values / GRID
    near = torch.cat([share[32:40], share[41:49]])
    if bool(((near > 0) & (near < 1)).all()):
        rate = torch.logit(near) / torch.cat([GRID[32:40], GRID[41:49]])
        if float(rate.min()) > 0.1 and float(rate.max() - rate.min()) < 1e-3:
            return "silu", nn.SiLU()
    return None
