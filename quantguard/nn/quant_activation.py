"""QuantActivation, the one module that conversion adds: a float activation and a quantizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..core.errors import ConversionError, SpecError
from ..core.specs import QuantSpec
from .functional.reference import recording, unrecorded
from .functional.staircase import (
    MOST_SOFTENED,
    Surrogate,
    needs_plain_operations,
    soft_jumps,
    soft_quantizer,
    staircase,
    without_function_modes,
)
from .functional.surrogates import resampled
from .thresholds import GAP_FLOOR, QuantizerThresholds

__all__ = ["GAP_FLOOR", "HOOKS", "QuantActivation", "QuantizerState", "absorbed_range",
           "quantizers"]

# Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
         "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
         "_backward_pre_hooks")


class QuantizerState(NamedTuple):
    """Current behaviour of a quantizer, as the contexts of ``contexts.py`` set it.

    Attributes:
        action: "quantize", "soften", "bypass" or "observe".
        sharpness: k of the softened quantizer.
        surrogate: the surrogate gradient.
        override: computes the result instead, where the input is not overwritten
            (``pool_reordering``).
        bits: another number of bits over the same range; None: its own.
        by_image: whether windows of the softened quantizer depend on the image.
    """

    action: str = "quantize"
    sharpness: float = 0.0
    surrogate: Surrogate = Surrogate()
    override: Callable[[QuantActivation, Tensor], Tensor] | None = None
    bits: int | None = None
    by_image: bool = False


def absorbed_range(function: nn.Module) -> tuple[float, float] | None:
    """Return where f is the identity if f only clips (then q absorbs it), else None."""
    if type(function) is nn.ReLU:
        return 0.0, math.inf
    if type(function) is nn.ReLU6:
        return 0.0, 6.0
    return None


class QuantActivation(QuantizerThresholds):
    """Quantized activation ``y = q(f(x))``: a float activation f followed by a quantizer q.

    An f that only clips (ReLU, ReLU6) is absorbed: q alone runs, on x. A dynamic quantizer learns
    its thresholds, which ascend by construction: the parameters are logarithms of gaps relative to
    their initial values.

    Args:
        spec: bits, fixed or dynamic, per tensor or per channel.
        function: the float activation f, without parameters; None for the identity.
        channels: number of channels where ``spec.per_channel``; set_thresholds may change it.
        axis: the channel dimension where ``spec.per_channel``.
        inplace: write the result into x as well, for callers that read x again.

    Attributes:
        shift, log_gaps, log_step: the parameters of a dynamic quantizer, all 0 at the start:
            ``t_1 = base_1 + base_step * shift``, gap ``i`` grows by ``exp(log_gaps_i)``, step by
            ``exp(log_step)``.

    Raises:
        SpecError: ``spec`` asks for 32 bits.
    """

    function: nn.Module
    exempt = False  # kept in float whatever the context (``evaluation.site_sensitivity``)

    def __init__(self, spec: QuantSpec, function: nn.Module | None = None, *,
                 channels: int = 1, axis: int = 1, inplace: bool = False) -> None:
        super().__init__()
        if spec.is_float:
            raise SpecError("a quantized activation has 1 to 8 bits, not 32",
                            fix="Leave this activation as it is.")
        self.spec, self.inplace = spec, inplace
        self.axis = axis if spec.per_channel else None
        # Not a submodule: it has no state, and a ReLU in .modules() would seem unconverted.
        self.__dict__["function"] = copy.deepcopy(function) if function else nn.Identity()
        for hooks in HOOKS:  # they belong to the module in the model
            getattr(self.function, hooks).clear()
        # f must not write to x: only ``inplace`` of this module does.
        self.float_inplace = bool(getattr(self.function, "inplace", False))
        if hasattr(self.function, "inplace"):
            setattr(self.function, "inplace", False)  # noqa: B010 - typed as a Module
        # Other forms than uniform replace the activation instead of following it.
        replaces = spec.form != "uniform"
        self.gate = absorbed_range(self.function)
        self.absorbs = replaces or self.gate is not None
        m = spec.thresholds
        shape = (channels, m) if spec.per_channel else (m,)
        self._start_from(torch.arange(m).add(0.5).expand(shape), torch.ones(shape[:-1]),
                         torch.ones(shape[:-1]), torch.zeros(()))
        self._state = QuantizerState()
        self._listener: Callable[[Tensor], None] | None = None
        # Set by ``conversion.runtime_dispatch``, which tells the calls of a forward apart.
        self.instead: Callable[[], QuantActivation | None] | None = None

    @classmethod
    def from_thresholds(cls, thresholds: Tensor | Sequence[float], step: Tensor | float,
                        zero: float = 0, width: Tensor | float | None = None,
                        dynamic: bool = False) -> QuantActivation:
        """Return a quantizer with explicit numbers and no float activation.

        Args:
            thresholds: (m,), or (C, m) per channel, strictly ascending; m = 2^bits - 1.
            step: the distance of two levels, positive; (C,) per channel.
            zero: the level that is 0; 2 * zero is an integer.
            width: the window at 1 bit; None: 2 t_1 where that is positive, else step.
            dynamic: whether thresholds and step are learned.

        Raises:
            SpecError: numbers that do not make a quantizer.

        Example:
            >>> QuantActivation.from_thresholds([0.5, 1.5, 2.5], step=1.0)(torch.tensor([0.7, 9.0]))
            tensor([1., 3.])
        """
        t = torch.as_tensor(thresholds, dtype=torch.float32)
        bits = (t.shape[-1] + 1).bit_length() - 1 if t.dim() in (1, 2) else 0
        if t.dim() not in (1, 2) or t.shape[-1] != 2**bits - 1 or not 1 <= bits <= 8:
            raise SpecError(f"thresholds have shape {tuple(t.shape)}",
                            fix="Give (m,) or (C, m), m = 2^bits - 1 for 1 to 8 bits.")
        per_channel = t.dim() == 2
        module = cls(QuantSpec(bits, dynamic, per_channel))
        module.set_thresholds(t, step, zero, width)
        return module

    def forward(self, x: Tensor, value: Tensor | None = None) -> Tensor:
        """Return q(f(x)), in x's shape, type and memory order.

        Args:
            x: what f is applied to.
            value: f(x), if the model has computed it already.

        Raises:
            ConversionError: under torch.jit.trace in training mode, or under torch.onnx.export with
                dynamo=False if it overwrites x.
        """
        if isinstance(x, fx.Proxy):
            # A leaf for every tracer: traced operations would lose the surrogate gradient.
            path = x.tracer.path_of_module(self)
            args = (x,) if value is None else (x, value)
            return x.tracer.create_proxy("call_module", path, args, {})
        if self.instead is not None:
            other = self.instead()
            if other is not None:
                return other(x)  # type: ignore[no-any-return]
        action = self._state.action
        if action in ("bypass", "observe"):
            y = self._float(x) if value is None else value
            if action == "observe" and self._listener is not None:
                self._listener(y)
        else:
            z = x
            if not self.absorbs:
                z = self._float(x) if value is None else value
            if self._listener is not None:
                self._listener(z)
            override = None if self.inplace else self._state.override
            y = self.quantized(z) if override is None else override(self, z)
        if self.inplace and recording() and torch.onnx.is_in_onnx_export():
            raise ConversionError(
                "torch.onnx.export(dynamo=False) does not support an activation that writes over "
                "its input if that is read again",
                why="That exporter loses the write if a view reads it.",
                fix="Build the model with inplace=False and convert it, or use dynamo=True.")
        return x.copy_(y) if self.inplace else y

    def quantized(self, z: Tensor, state: QuantizerState | None = None) -> Tensor:
        """Return q(z), or the softened q(z) inside :func:`soften`.

        Args:
            z: the input of q.
            state: of an earlier call; None: the present one.
        """
        with without_function_modes(z):
            return self._quantized(z, self._state if state is None else state)

    def _quantized(self, z: Tensor, state: QuantizerState) -> Tensor:
        if recording() and self.training:
            raise ConversionError(
                "torch.jit.trace and the ONNX exporter built on it do not record a quantized "
                "activation in training mode",
                why="What they record has no surrogate gradient.",
                fix="Call model.eval() first; to train what is compiled, use torch.compile.")
        with unrecorded():  # learned numbers use operations that ONNX lacks
            t, step, zero, axis = self.thresholds, self.step, self.zero_level, self.axis
            window = self._window(t)
            if state.bits is not None:
                t, step, zero, window = resampled(t, step, zero, window, 2**state.bits - 1)
        if state.action == "soften" and state.by_image and t.shape[-1] <= MOST_SOFTENED \
                and not (needs_plain_operations() or recording()):
            return soft_jumps(z, t.detach(), step.detach().unsqueeze(-1).expand(t.shape),
                              (-zero * step).detach(), window.detach(), state.sharpness, axis,
                              True)
        if state.action == "soften":
            return soft_quantizer(z, t, step, window, zero, state.sharpness, axis)
        return staircase(z, t, step, window, zero, state.surrogate, self.gate, axis)

    @torch.no_grad()
    def levels(self, z: Tensor) -> Tensor:
        """Return the index of the level of each element of z, 0 to m."""
        with unrecorded():
            t, ones = self.thresholds, torch.ones_like(self.step)
            zero = torch.zeros_like(self.zero_level)
        return staircase(z.detach().float(), t, ones, ones, zero, axis=self.axis).long()

    def _float(self, x: Tensor) -> Tensor:
        if type(self.function) is nn.RReLU:
            self.function.training = self.training
        y: Tensor = self.function(self._saveable(x))
        return y

    def _saveable(self, x: Tensor) -> Tensor:
        """Return x as f may save it for backward: a copy if x is overwritten afterwards."""
        return x.clone() if self.inplace else x

    @property
    def bypassed(self) -> bool:
        """Return whether it is switched off at present, and need not be called."""
        return self._state.action == "bypass"

    @property
    def softened(self) -> bool:
        """Return whether it is softened at present."""
        return self._state.action == "soften"

    @property
    def in_float(self) -> bool:
        """Return whether it returns the value of the float activation at present."""
        return self._state.action in ("bypass", "observe")

    def __prepare_scriptable__(self) -> Any:
        raise ConversionError("torch.jit.script cannot read a quantized activation",
                              fix="Use torch.jit.trace(model.eval(), example).")

    def extra_repr(self) -> str:
        kind = "dynamic" if self.spec.dynamic else "fixed"
        name = type(self.function).__name__
        form = "" if self.spec.form == "uniform" else f", {self.spec.form}"
        rows = f", {self.base.shape[0]} channels" if self.spec.per_channel else ""
        return f"{self.spec.bits} bits, {kind}{form}{rows}, after {name}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float checkpoint has no keys of the quantizer, which then keeps its values. A checkpoint
        # with only some of them is damaged, and strict loading reports it.
        if any(key.startswith(prefix) for key in state_dict):
            base = state_dict.get(f"{prefix}base")
            if self.spec.per_channel and base is not None and base.shape[0] != self.base.shape[0]:
                self._start_from(base, base[..., 0], base[..., 0], self.zero_level)
            super()._load_from_state_dict(state_dict, prefix, *args)


def quantizers(model: nn.Module) -> dict[str, QuantActivation]:
    """Return every quantized activation of model by its full name, without exempt ones."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, QuantActivation) and not m.exempt}
