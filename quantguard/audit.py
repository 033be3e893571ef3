"""Run one input through a converted model: what runs, what still runs in float, is it the same?"""

from __future__ import annotations

import sys
import time
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activation import QuantActivation, staircases
from .contexts import bypass
from .discovery import NOT_REACHED
from .entrance import is_input
from .kinds import ALWAYS_KEPT, kind_of
from .plan import Plan
from .running import copied, evaluating, run, seeded, tensors_in
from .shadow import TensorShadows


@dataclass(frozen=True)
class Audit:
    """Say what one input saw.

    Attributes:
        ran: staircases that ran in eval mode; the others are auxiliary (training only).
        left: activations that ran in float although no site names them: "module: kind".
        identical: whether ``bypass`` gave the float model's output bit for bit; on the meta
            device, in its shapes.
        seconds: how long it took.
    """

    ran: tuple[str, ...]
    left: tuple[str, ...]
    identical: bool
    seconds: float = field(default=0.0, compare=False)


class Watch(TorchFunctionMode):
    """Note every activation that runs in float: outside a staircase, and none follows it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._shadows = TensorShadows()
        self._found: dict[int, tuple[str, str]] = {}  # number of a value -> module, kind

    @property
    def found(self) -> list[tuple[str, str]]:
        """Return what ran in float: the module it ran in, and its kind."""
        return list(self._found.values())

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        spelled = self._shadows.ran(result, func, args, kwargs)
        if kind is None and spelled is not None:
            kind = spelled.kind
        if kind is None or kind in ALWAYS_KEPT or self._shadows.is_constant(result):
            return result
        owner = self._caller()
        if owner is not None:
            for number in spelled.through if spelled is not None else ():
                self._found.pop(number, None)
            self._found[self._shadows.number(result)] = owner, kind
        return result

    def quantized(self, _module: nn.Module, args: Any) -> None:
        """Note that a staircase follows: a forward pre-hook of every staircase."""
        for value in args:
            if not self._shadows.is_constant(value):
                self._found.pop(self._shadows.number(value), None)

    def _caller(self) -> str | None:
        """Return the innermost module of the model on the stack; None inside a staircase."""
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None:
            module: Any = frame.f_locals.get("self")
            if isinstance(module, QuantActivation):
                return None
            if isinstance(module, nn.Module) and id(module) in self._paths:
                return self._paths[id(module)]
            frame = frame.f_back
        return ""


def audit(original: nn.Module, converted: nn.Module, plan: Plan, inputs: Any) -> Audit:
    """Run inputs through both models in eval mode, on the same random numbers."""
    # What was thought never to run is not kept for a reason: if it does, it is left over.
    sites = [s for s in plan.kept if s.reason not in ("never called", NOT_REACHED)]
    kept = {(s.owner, s.kind) for s in sites} | {(s.name, s.kind) for s in sites} | {
        (f"{s.owner}.{s.target}".lstrip("."), s.kind) for s in sites}
    begin = time.perf_counter()
    # Without gradients torch's fused encoder layers call no activation: nobody's would be compared.
    fused = any(isinstance(m, nn.TransformerEncoderLayer) for m in original.modules())
    with torch.no_grad(), evaluating(original), evaluating(converted):
        outputs = []
        for model in (original, converted):
            with seeded(0), bypass(model), torch.set_grad_enabled(fused):
                outputs.append(run(model, copied(inputs)))
        ran: list[str] = []
        watch = Watch(converted)
        handles = []
        for name, module in staircases(converted).items():
            if is_input(name):
                continue  # no site
            handles.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
            handles.append(module.register_forward_pre_hook(watch.quantized))
        try:
            with seeded(0), watch:
                run(converted, copied(inputs))
        finally:
            for handle in handles:
                handle.remove()
    pairs = zip(tensors_in(outputs[0]), tensors_in(outputs[1]), strict=True)
    identical = all(a.shape == b.shape if a.is_meta else
                    torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    left = [f"{owner or 'the model itself'}: {kind}" for owner, kind in watch.found
            if (owner, kind) not in kept]
    return Audit(tuple(dict.fromkeys(ran)), tuple(dict.fromkeys(left)), identical,
                 time.perf_counter() - begin)
