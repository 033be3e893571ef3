"""One quantizer in many spellings, with every kind of backward, and a small net around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = torch.tensor([0.25, 0.75, 1.25])
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5])


class Clipped(torch.autograd.Function):
    """Straight-through estimator inside the range, as in PACT."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z.clamp(0, 1.5) * 2).round() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grads[0] * ((z > 0) & (z < 1.5))


class LearnedStep(torch.autograd.Function):
    """Function of two tensors, as in LSQ."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(z, s)
        return (z / s).clamp(0, 3).round() * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        z, s = ctx.saved_tensors
        return grads[0] * ((z > 0) & (z < 3 * s)), (grads[0] * z).sum()


class Misleading(torch.autograd.Function):
    """Function whose backward has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return (z.clamp(0, 1.5) * 2).round() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


BOUND_APPLY = Clipped.apply


def rounded(z: Tensor) -> Tensor:
    return (z.clamp(0, 1.5) * 2).round() / 2


def detached(z: Tensor) -> Tensor:
    y = z.clamp(0, 1.5)
    return y + (rounded(y) - y).detach()


def without_grad(z: Tensor) -> Tensor:
    with torch.no_grad():
        q = rounded(z)
    y = z.clamp(0, 1.5)
    return y + q - y.detach()


def by_data(z: Tensor) -> Tensor:
    y = z.clamp(0, 1.5) * 1
    y.data = rounded(y.data)
    return y


def in_place(z: Tensor) -> Tensor:
    z = z.clone()
    z.clamp_(0, 1.5).mul_(2)
    z.data.round_()
    return z.div_(2)


def per_channel(z: Tensor) -> Tensor:
    count = z.shape[1]
    return torch.fake_quantize_per_channel_affine(z, torch.full((count,), 0.5), torch.zeros(count),
                                                  1, 0, 3)


def by_numpy(z: Tensor) -> Tensor:
    levels = np.digitize(z.detach().numpy(), T.numpy(), right=True) * np.float32(0.5)
    return torch.from_numpy(levels.astype(np.float32)) + 0 * z


def remainder(z: Tensor) -> Tensor:
    y = z.clamp(0, 1.5) + 0.25
    return y - y % 0.5


def by_quantized_tensor(z: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but in use
        q = torch.quantize_per_tensor(z.detach().clamp(0, 1.5), 0.5, 0, torch.quint8)
    return q.dequantize() + 0 * z


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "Function": lambda z: Clipped.apply(z), "Function's apply": BOUND_APPLY,
    "Function of two": lambda z: LearnedStep.apply(z, torch.tensor(0.5)),
    "misleading Function": lambda z: Misleading.apply(z),
    "round": rounded, "detach": detached, "no_grad": without_grad, ".data": by_data,
    "in place": in_place, "remainder": remainder, "numpy": by_numpy,
    "fake_quantize": lambda z: torch.fake_quantize_per_tensor_affine(z, 0.5, 0, 0, 3),
    "fake_quantize per channel": per_channel,
    "bucketize": lambda z: LEVELS[torch.bucketize(z, T)],
    "nearest": lambda z: LEVELS[(z.detach().unsqueeze(-1) - LEVELS).abs().argmin(-1)] + 0 * z,
    "one-hot": lambda z: F.one_hot(torch.bucketize(z.detach(), T), 4).float() @ LEVELS + 0 * z,
    "int": lambda z: (z.clamp(0, 1.5) * 2 + 0.5).int().float() / 2,
    "quantize": by_quantized_tensor,
    "heaviside": lambda z: 0.5 * sum(  # type: ignore[return-value]
        torch.heaviside((z - t).detach(), torch.zeros(())) for t in T) + 0 * z,
    "comparisons": lambda z: 0.5 * (z.unsqueeze(-1) > T).sum(-1).float() + 0 * z,
    "where": lambda z: torch.where(z > 1.25, 1.5, torch.where(
        z > 0.75, 1.0, torch.where(z > 0.25, 0.5, 0.0))) + 0 * z,
    "signs": lambda z: 0.75 + 0.25 * sum(torch.sign(z - t) for t in T)}  # type: ignore[return-value]


class Quantizing(nn.Module):
    """A small net of convolutions, BatchNorm, pooling and linear layers around a quantizer."""

    def __init__(self, *quantizers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.hidden = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(128, 16)
        self.last = nn.Linear(16, 4)
        self.quantizers = quantizers * (1 if len(quantizers) == 3 else 3)
        self.quantizer_modules = nn.ModuleList(q for q in quantizers if isinstance(q, nn.Module))
        for layer in (self.first, self.second, self.hidden):
            layer.weight.data *= 2
            layer.bias.data += 0.2  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.quantizers
        y = b(self.second(a(self.norm(self.first(x)))))
        return self.last(c(self.hidden(y.flatten(1))))  # type: ignore[no-any-return]
