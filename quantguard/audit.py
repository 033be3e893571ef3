"""Run one input through a converted model: what runs, what still runs in float, is it the same?"""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activation import QuantActivation, bypass, staircases
from .running import evaluating, run, seeded
from .sites import Plan
from .tracing import KIND_OF_FUNCTION, KIND_OF_METHOD

_SIDES = (224, 299, 32, 28, 64, 96, 8)


@dataclass(frozen=True)
class Audit:
    """Say what one input saw.

    Attributes:
        ran: staircases that ran in eval mode; the others are auxiliary (training only).
        left: activations that ran in float although no site names them: "module: kind".
        identical: whether ``bypass`` gave the float model's output bit for bit.
    """

    ran: tuple[str, ...]
    left: tuple[str, ...]
    identical: bool


class _Watch(TorchFunctionMode):
    """Note every activation function that runs outside a staircase, with the module it is in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KIND_OF_FUNCTION.get(func)
        if kind is None and getattr(func, "__objclass__", None) is torch._C.TensorBase:
            kind = KIND_OF_METHOD.get(func.__name__)
        if kind is not None:
            owner = self._caller()
            if owner is not None:
                self.found.append((owner, kind))
        return func(*args, **(kwargs or {}))

    def _caller(self) -> str | None:
        """Return the innermost module of the model on the stack; None inside a staircase."""
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None:
            module: Any = frame.f_locals.get("self")
            if isinstance(module, QuantActivation):
                return None
            if isinstance(module, nn.Module) and id(module) in self.paths:
                return self.paths[id(module)]
            frame = frame.f_back
        return ""


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def audit(original: nn.Module, converted: nn.Module, plan: Plan, inputs: Any) -> Audit:
    """Run inputs through both models in eval mode, on the same random numbers."""
    kept = {(site.owner, site.kind) for site in plan.kept} | {
        (f"{site.owner}.{site.target}".lstrip("."), site.kind) for site in plan.kept} | {
        (site.name, site.kind) for site in plan.kept}
    ran: list[str] = []
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
               for name, module in staircases(converted).items()]
    watch = _Watch(converted)
    outputs = []
    try:
        for model, watching in ((original, nullcontext()), (converted, watch)):
            with torch.no_grad(), seeded(0), evaluating(model), bypass(model), watching:
                outputs.append(run(model, _copy(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    pairs = list(zip(_tensors(outputs[0]), _tensors(outputs[1]), strict=True))
    identical = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    left = [f"{owner or 'the model itself'}: {kind}" for owner, kind in watch.found
            if (owner, kind) not in kept]
    return Audit(tuple(dict.fromkeys(ran)), tuple(dict.fromkeys(left)), identical)


def _copy(inputs: Any) -> Any:
    """Return inputs that a model may overwrite."""
    if isinstance(inputs, dict):
        return {k: _copy(v) for k, v in inputs.items()}
    return inputs.clone() if isinstance(inputs, Tensor) else inputs


def find_example(model: nn.Module) -> Tensor | None:
    """Return an input of two images that model accepts in eval mode, or None.

    Tried: what the architecture says of itself, then the channels of its first convolution at
    usual sizes, or the features of its first linear layer.
    """
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    parameter = next(model.parameters(), None)
    if first is None or parameter is None:
        return None
    shapes: list[tuple[int, ...]] = []
    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if isinstance(said, dict) and said.get("input_size"):
        shapes.append((2, *said["input_size"]))
    if isinstance(first, nn.Conv2d):
        shapes += [(2, first.in_channels, side, side) for side in _SIDES]
    else:
        shapes.append((2, first.in_features))
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        example = torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)
        try:
            with torch.no_grad(), evaluating(model), seeded(0):
                model(example)
        except Exception:
            continue
        return example
    return None
