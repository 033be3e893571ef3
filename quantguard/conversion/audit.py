"""Audit a converted model on one input: quantizers that run, float activations, faithfulness."""

from __future__ import annotations

import sys
import time
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.model_calls import run
from ..core.module_utils import evaluating
from ..core.nested_tensors import copied, tensors_in
from ..core.runtime import seeded
from ..nn.activation_kinds import ALWAYS_EXCLUDED, kind_of
from ..nn.contexts import bypass
from ..nn.input_quantizer import is_input
from ..nn.numeric_match import TensorShadows
from ..nn.quant_activation import QuantActivation, quantizers
from .plan import Plan
from .runtime_discovery import NOT_REACHED


@dataclass(frozen=True)
class Audit:
    """Result of running one input through a converted model.

    Attributes:
        ran: quantizers that ran in eval mode; the others are auxiliary (training only).
        left: activations that ran in float although no site excludes them: "module: kind".
        identical: whether the output under ``bypass`` equals the float model's bit for bit; on
            the meta device, whether the shapes are equal.
        seconds: run time of the audit.
    """

    ran: tuple[str, ...]
    left: tuple[str, ...]
    identical: bool
    seconds: float = field(default=0.0, compare=False)


class FloatActivations(TorchFunctionMode):
    """Torch-function mode that records activations that run in float, without a quantizer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._shadows = TensorShadows()
        self._found: dict[int, tuple[str, str]] = {}  # number of a value -> (module, kind)

    @property
    def found(self) -> list[tuple[str, str]]:
        """Return (module, kind) of each activation that ran in float."""
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
        if kind is None or kind in ALWAYS_EXCLUDED or self._shadows.is_constant(result):
            return result
        owner = self._caller()
        if owner is not None:
            for number in spelled.through if spelled is not None else ():
                self._found.pop(number, None)
            self._found[self._shadows.number(result)] = owner, kind
        return result

    def quantized(self, _module: nn.Module, args: Any) -> None:
        """Forget an activation that a quantizer follows: a forward pre-hook of every quantizer."""
        for value in args:
            if not self._shadows.is_constant(value):
                self._found.pop(self._shadows.number(value), None)

    def _caller(self) -> str | None:
        """Return the innermost module of the model on the stack; None inside a quantizer."""
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
    """Run inputs through both models in eval mode, with the same random numbers."""
    # A site that was expected never to run is no excuse: if it runs, it is reported.
    sites = [s for s in plan.excluded if s.reason not in ("never called", NOT_REACHED)]
    excluded = {(s.owner, s.kind) for s in sites} | {(s.name, s.kind) for s in sites} | {
        (f"{s.owner}.{s.target}".lstrip("."), s.kind) for s in sites}
    begin = time.perf_counter()
    # Without gradients torch's fused encoder layers call no activation that could be compared.
    fused = any(isinstance(m, nn.TransformerEncoderLayer) for m in original.modules())
    with torch.no_grad(), evaluating(original), evaluating(converted):
        outputs = []
        for model in (original, converted):
            with seeded(0), bypass(model), torch.set_grad_enabled(fused):
                outputs.append(run(model, copied(inputs)))
        ran: list[str] = []
        in_float = FloatActivations(converted)
        handles = []
        for name, module in quantizers(converted).items():
            if is_input(name):
                continue  # not a site
            handles.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
            handles.append(module.register_forward_pre_hook(in_float.quantized))
        try:
            with seeded(0), in_float:
                run(converted, copied(inputs))
        finally:
            for handle in handles:
                handle.remove()
    pairs = zip(tensors_in(outputs[0]), tensors_in(outputs[1]), strict=True)
    identical = all(a.shape == b.shape if a.is_meta else
                    torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    left = [f"{owner or 'the model itself'}: {kind}" for owner, kind in in_float.found
            if (owner, kind) not in excluded]
    return Audit(tuple(dict.fromkeys(ran)), tuple(dict.fromkeys(left)), identical,
                 time.perf_counter() - begin)
