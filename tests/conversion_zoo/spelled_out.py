"""Zoo models with an activation in many forms: functions, methods and arithmetic."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import TYPICAL, UNSEEN, Case, rows
from quantguard.nn.activation_kinds import GATES


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda self, x: F.relu(x),
    "method": lambda self, x: x.relu(),
    "operator": lambda self, x: x * (x > 0),
    "operator swapped": lambda self, x: (x > 0) * x,
    "method and cast": lambda self, x: x.mul(x.gt(0).to(x.dtype)),
    "float mask": lambda self, x: (x >= 0).float() * x,
    "torch.clamp min=": lambda self, x: torch.clamp(x, min=0),
    "clamp method": lambda self, x: x.clamp(0),
    "clamp_": lambda self, x: x.clamp_(min=0),
    "clamp_min": lambda self, x: x.clamp_min(0),
    "clamp_min_": lambda self, x: x.clamp_min_(0),
    "clip": lambda self, x: torch.clip(x, min=0),
    "clip_": lambda self, x: x.clip_(min=0.0),
    "clamp tensor": lambda self, x: x.clamp(min=torch.zeros(())),
    "maximum zeros_like": lambda self, x: torch.maximum(x, torch.zeros_like(x)),
    "maximum new_zeros": lambda self, x: x.maximum(x.new_zeros(())),
    "maximum tensor": lambda self, x: torch.maximum(torch.tensor(0.0), x),
    "max": lambda self, x: torch.max(x, torch.zeros_like(x)),
    "max zeros": lambda self, x: torch.max(torch.zeros(6), x),
    "minus minimum": lambda self, x: -torch.minimum(-x, torch.zeros_like(x)),
    "where 0": lambda self, x: torch.where(x > 0, x, 0),
    "where zeros": lambda self, x: torch.where(x <= 0, torch.zeros_like(x), x),
    "where method": lambda self, x: x.where(x > 0, torch.zeros_like(x)),
    "masked_fill": lambda self, x: x.masked_fill(x < 0, 0),
    "masked_fill_": lambda self, x: x.masked_fill_(x < 0, 0.0),
    "half of sum": lambda self, x: (x + x.abs()) / 2,
    "half of sum, abs()": lambda self, x: 0.5 * (x + abs(x)),
    "threshold": lambda self, x: F.threshold(x, 0, 0),
    "threshold off zero": lambda self, x: F.threshold(x, 0.2, -0.1),
    "threshold_": lambda self, x: F.threshold_(x, 0.1, 0.05),
    "where leaky": lambda self, x: torch.where(x > 0, x, 0.2 * x),
    "max leaky": lambda self, x: torch.max(x, x * 0.2),
    "learned leaky": lambda self, x: torch.where(x > 0, x, self.beta * x),
    "prelu": lambda self, x: F.prelu(x, self.beta),
    "prelu module": lambda self, x: self.prelu(x),
    "prelu channels": lambda self, x: self.prelu(x),
    "x sigmoid": lambda self, x: x * torch.sigmoid(x),
    "sigmoid x": lambda self, x: x.sigmoid() * x,
    "x / (1 + exp)": lambda self, x: x / (1 + torch.exp(-x)),
    "x sigmoid in place": lambda self, x: x.mul_(x.sigmoid()),
    "x sigmoid beta": lambda self, x: x * torch.sigmoid(self.beta * x),
    "quick gelu": lambda self, x: x * torch.sigmoid(1.702 * x),
    "hardswish": lambda self, x: x * F.relu6(x + 3) / 6,
    "hardswish clamp": lambda self, x: x * (x + 3).clamp(0, 6) * (1 / 6),
    "hardsigmoid": lambda self, x: F.relu6(x + 3) / 6,
    "gelu erf": lambda self, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu erf method": lambda self, x: x * 0.5 * (1.0 + (x * 0.7071067811865476).erf()),
    "gelu tanh": lambda self, x: gelu_tanh(x),
    "mish": lambda self, x: x * torch.tanh(F.softplus(x)),
    "mish logs": lambda self, x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "softplus": lambda self, x: torch.log(1 + torch.exp(x)),
    "softplus log1p": lambda self, x: x.exp().log1p(),
    "softsign": lambda self, x: x / (1 + x.abs()),
    "elu": lambda self, x: torch.where(x > 0, x, torch.exp(x) - 1),
    "elu expm1": lambda self, x: torch.where(x > 0, x, torch.expm1(x)),
    "relu6 clamp": lambda self, x: x.clamp(0, 6),
    "relu6 in two": lambda self, x: F.relu(x).clamp(max=6),
    "hardtanh clamp": lambda self, x: torch.clamp(x, -1, 1),
    "hardtanh_": lambda self, x: F.hardtanh_(x, -1.0, 0.5),
    "tanh exp": lambda self, x: 1 - 2 / (torch.exp(2 * x) + 1),
    "celu": lambda self, x: F.celu(x, 0.7),
    "selu_": lambda self, x: F.selu(x, True),
    "silu in place": lambda self, x: F.silu(x, inplace=True),
    "logsigmoid": lambda self, x: F.logsigmoid(x),
    "softshrink": lambda self, x: F.softshrink(x, 0.1),
    "hardshrink": lambda self, x: x.hardshrink(0.1),
    "tanhshrink": lambda self, x: F.tanhshrink(x),
    "negated": lambda self, x: -F.relu(-x),
    "operator module": lambda self, x: operator.mul(x, operator.gt(x, 0)),
    "getattr": lambda self, x: getattr(F, "re" + "lu")(x),
    "map": lambda self, x: next(map(F.relu, [x])),
    "relu squared": lambda self, x: F.relu(x) ** 2,
    "leaky of two relus": lambda self, x: F.relu(x) - 0.2 * F.relu(-x),
    "elu of relu": lambda self, x: F.relu(x) + torch.clamp(torch.exp(x) - 1, max=0),
    "hardswish in place": lambda self, x: (x + 3).clamp_(0, 6).mul_(x).div_(6),
    "tanh of sigmoid": lambda self, x: 2 * torch.sigmoid(2 * x) - 1,
    "scaled tanh": lambda self, x: 1.7159 * torch.tanh(2 / 3 * x),
    "softplus beta": lambda self, x: F.softplus(x, beta=2),
    "logaddexp": lambda self, x: torch.logaddexp(x, torch.zeros_like(x)),
    "aten": lambda self, x: torch.ops.aten.relu(x),
    "chain": lambda self, x: F.gelu(torch.tanh(x)),
    "spelled chain": lambda self, x: F.gelu(x * (x > 0)),
    "chain, spelled": lambda self, x: gelu_tanh(F.relu(x)),
    "chain of methods": lambda self, x: x.tanh().relu().sigmoid(),
    "augmented": lambda self, x: multiply(x, torch.sigmoid(x)),
    "made on the fly": lambda self, x: nn.ReLU()(x),
    "index assignment": lambda self, x: zero_below(x.clone()),
    "keyword clamp": lambda self, x: torch.clamp(input=x, min=0),
    "keyword where": lambda self, x: torch.where(condition=x > 0, input=x, other=x.new_zeros(())),
    "detached mask": lambda self, x: x * (x.detach() > 0),
    "inverted mask": lambda self, x: x.masked_fill(~(x > 0), 0),
    "where full": lambda self, x: torch.where(x > 0, x, torch.full_like(x, 0)),
    "expit": lambda self, x: x * torch.special.expit(x),
    "in a view": lambda self, x: (x.view(-1) * (x.view(-1) > 0)).view_as(x),
    "aten default": lambda self, x: torch.ops.aten.relu.default(x),
}


def zero_below(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    x *= factor
    return x


class Spelled(nn.Module):
    """Model that applies one of FORMS between two layers and reads its input again."""

    def __init__(self, form: str, opaque: bool) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.beta = nn.Parameter(torch.tensor(0.7))
        if form == "prelu module":
            self.prelu = nn.PReLU()
        if form == "prelu channels":
            self.prelu = nn.PReLU(6)
        self.tail = nn.Sequential(nn.ReLU(), nn.Linear(6, 3))
        self.form, self.opaque = form, opaque

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.opaque and bool(x.detach().abs().amax() > 1e6):
            return self.tail(h)
        y = FORMS[self.form](self, h)
        return self.tail(self.last(y) + self.other(h))



def spelled(kind: str, form: str, opaque: bool) -> Case:
    excluded: tuple[str, ...] = ()
    if opaque:  # no graph shows the use of a gate
        excluded = tuple(f"{part}: {UNSEEN}" for part in kind.split() if part in GATES)
        kind = " ".join(part for part in kind.split() if part not in GATES)
    own = ("transparent", "calibrated", "active") if opaque else ("bypass",)
    return Case(functools.partial(Spelled, form, opaque), " ".join(sorted([*kind.split(), "relu"])),
                excluded, rows, {"dynamic": opaque}, settings=TYPICAL,
                checks=("found", "reported", *own, *(("fed",) if not excluded else ())))


KINDS = {
    "function": "relu", "method": "relu", "operator": "relu", "operator swapped": "relu",
    "method and cast": "relu", "float mask": "relu", "torch.clamp min=": "relu",
    "clamp method": "relu", "clamp_": "relu", "clamp_min": "relu", "clamp_min_": "relu",
    "clip": "relu", "clip_": "relu", "clamp tensor": "relu", "maximum zeros_like": "relu",
    "maximum new_zeros": "relu", "maximum tensor": "relu", "max": "relu", "max zeros": "relu",
    "minus minimum": "relu", "where 0": "relu", "where zeros": "relu", "where method": "relu",
    "masked_fill": "relu", "masked_fill_": "relu", "half of sum": "relu",
    "half of sum, abs()": "relu", "threshold": "threshold", "threshold off zero": "threshold",
    "threshold_": "threshold", "where leaky": "leaky_relu", "max leaky": "leaky_relu",
    "learned leaky": "leaky_relu", "prelu": "prelu", "prelu module": "prelu",
    "prelu channels": "prelu", "x sigmoid": "silu", "sigmoid x": "silu", "x / (1 + exp)": "silu",
    "x sigmoid in place": "silu", "x sigmoid beta": "silu", "quick gelu": "quick_gelu",
    "hardswish": "hardswish", "hardswish clamp": "hardswish", "hardsigmoid": "hardsigmoid",
    "gelu erf": "gelu", "gelu erf method": "gelu", "gelu tanh": "gelu", "mish": "mish",
    "mish logs": "mish", "softplus": "softplus", "softplus log1p": "softplus",
    "softsign": "softsign", "elu": "elu", "elu expm1": "elu", "relu6 clamp": "relu6",
    "relu6 in two": "relu6", "hardtanh clamp": "hardtanh", "hardtanh_": "hardtanh",
    "tanh exp": "tanh", "celu": "celu", "selu_": "selu", "silu in place": "silu",
    "logsigmoid": "log_sigmoid", "softshrink": "softshrink", "hardshrink": "hardshrink",
    "tanhshrink": "tanhshrink", "negated": "relu", "operator module": "relu", "getattr": "relu",
    "map": "relu", "relu squared": "relu", "leaky of two relus": "leaky_relu", "elu of relu": "elu",
    "hardswish in place": "hardswish", "tanh of sigmoid": "tanh", "scaled tanh": "tanh",
    "softplus beta": "softplus", "logaddexp": "softplus", "aten": "relu",
    "chain": "gelu tanh", "spelled chain": "gelu relu", "chain, spelled": "gelu relu",
    "chain of methods": "relu sigmoid tanh", "augmented": "silu", "made on the fly": "relu",
    "index assignment": "relu", "keyword clamp": "relu", "keyword where": "relu",
    "detached mask": "relu", "inverted mask": "relu", "where full": "relu", "expit": "silu",
    "in a view": "relu", "aten default": "relu",
}
OVERWRITING = ("clamp_", "clamp_min_", "clip_", "masked_fill_", "threshold_", "x sigmoid in place",
               "hardtanh_", "selu_", "silu in place", "augmented")

CASES: dict[str, Case] = {
    f"{form}{', not traceable' if opaque else ''}": spelled(kind, form, opaque)
    for form, kind in KINDS.items() for opaque in (False, True)}
