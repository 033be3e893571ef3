"""QuantActivation, the one nn.Module that conversion adds, and the contexts that switch it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .errors import ConversionError, SpecError
from .plain import recording, unrecorded
from .spec import QuantSpec
from .staircase import (
    MOST_SOFTENED,
    Surrogate,
    soft_jumps,
    soft_staircase,
    spelled_out,
    staircase,
    unwatched,
)
from .windows import resampled

# A learned gap never falls below this share of the gap it started from: unguarded, gaps merge
# under Adam and slopes explode.
GAP_FLOOR = 0.1


HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
         "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
         "_backward_pre_hooks")


class _State(NamedTuple):
    """What a staircase does just now: "quantize", "soften", "bypass" or "observe"."""

    action: str = "quantize"
    sharpness: float = 0.0
    surrogate: Surrogate = Surrogate()
    # Answers in a staircase's place, where results are not written into what it is given
    # (pooling.py).
    answers: Callable[[QuantActivation, Tensor], Tensor] | None = None
    bits: int | None = None  # other than its own
    by_image: bool = False  # softened by each image's own windows


def absorbed_range(function: nn.Module) -> tuple[float, float] | None:
    """Return where f is the identity, for an f that only clips; such an f is absorbed into q."""
    if type(function) is nn.ReLU:
        return 0.0, math.inf
    if type(function) is nn.ReLU6:
        return 0.0, 6.0
    return None


class QuantActivation(nn.Module):
    """Compute ``y = q(f(x))``: a float activation f followed by a staircase q.

    Where f only clips (ReLU, ReLU6) it is absorbed: q alone runs, on x. Thresholds of a dynamic
    staircase are learned; their order holds by construction, since the parameters are logarithms
    of gaps, relative to where they started.

    Args:
        spec: bits, fixed or dynamic, per tensor or per channel.
        function: the float activation f, without parameters; None for the identity.
        channels: number of channels where ``spec.per_channel``; set_thresholds may change it.
        axis: the channel dimension where ``spec.per_channel``.
        inplace: write the result into x as well, for callers that read x again.

    Attributes:
        shift, log_gaps, log_step: the parameters of a dynamic staircase, all 0 at the start:
            ``t_1 = base_1 + base_step * shift``, gap ``i`` grows by ``exp(log_gaps_i)``, step by
            ``exp(log_step)``.

    Raises:
        SpecError: ``spec`` asks for 32 bits.
    """

    base: Tensor
    base_step: Tensor
    base_width: Tensor
    zero_level: Tensor
    function: nn.Module
    exempt = False  # from every context, while it is held in float (sensitive.py)

    def __init__(self, spec: QuantSpec, function: nn.Module | None = None, *,
                 channels: int = 1, axis: int = 1, inplace: bool = False) -> None:
        super().__init__()
        if spec.is_float:
            raise SpecError("a staircase has 1 to 8 bits, not 32",
                            fix="Leave this activation as it is.")
        self.spec, self.inplace = spec, inplace
        self.axis = axis if spec.per_channel else None
        # Not a submodule: it has no state, and a ReLU among .modules() would read as one left over.
        self.__dict__["function"] = copy.deepcopy(function) if function else nn.Identity()
        for hooks in HOOKS:  # they belong to the module that stands in a model
            getattr(self.function, hooks).clear()
        # What it computes counts, not where: only ``inplace`` writes to x.
        self.float_inplace = bool(getattr(self.function, "inplace", False))
        if hasattr(self.function, "inplace"):
            setattr(self.function, "inplace", False)  # noqa: B010 - typed as a Module
        # The forms of the paper's lineage replace the activation; they do not follow it.
        replaces = spec.form != "uniform"
        self.gate = absorbed_range(self.function)
        self.absorbs = replaces or self.gate is not None
        m = spec.thresholds
        shape = (channels, m) if spec.per_channel else (m,)
        self._start_from(torch.arange(m).add(0.5).expand(shape), torch.ones(shape[:-1]),
                         torch.ones(shape[:-1]), torch.zeros(()))
        self._state = _State()
        self._listener: Callable[[Tensor], None] | None = None
        # Set while a forward runs whose calls are told apart at run time (interception.py).
        self.instead: Callable[[], QuantActivation | None] | None = None

    def _start_from(self, t: Tensor, step: Tensor, width: Tensor, zero: Tensor) -> None:
        for name, value in (("base", t), ("base_step", step), ("base_width", width),
                            ("zero_level", zero)):
            self.register_buffer(name, value.detach().float().clone().contiguous())
        if self.spec.dynamic:
            rows, device = step.shape, t.device
            self.shift = nn.Parameter(torch.zeros(rows, device=device))
            self.log_gaps = nn.Parameter(torch.zeros(*rows, t.shape[-1] - 1, device=device))
            self.log_step = nn.Parameter(torch.zeros(rows, device=device))

    @classmethod
    def from_thresholds(cls, thresholds: Tensor | Sequence[float], step: Tensor | float,
                        zero: float = 0, width: Tensor | float | None = None,
                        dynamic: bool = False) -> QuantActivation:
        """Build one staircase from explicit numbers.

        Args:
            thresholds: (m,), or (C, m) per channel, strictly ascending; m = 2^bits - 1.
            step: the distance of two levels, positive; (C,) per channel.
            zero: the level that is 0; 2 * zero is an integer.
            width: the window at 1 bit; None: 2 t_1 where that is positive, else step.
            dynamic: whether thresholds and step are learned.

        Raises:
            SpecError: numbers that do not make a staircase.

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

    @torch.no_grad()
    def set_thresholds(self, thresholds: Tensor, step: Tensor | float, zero: float = 0,
                       width: Tensor | float | None = None) -> None:
        """Place the staircase; a dynamic one starts learning from here.

        Raises:
            SpecError: thresholds that do not ascend, a step that is not positive, or shapes that
                do not fit.
        """
        device = self.base.device
        t = torch.as_tensor(thresholds, dtype=torch.float32, device=device)
        rows = t.shape[:-1]
        size = _per_row(step, rows, device, "step")
        if t.dim() != self.base.dim() or t.shape[-1] != self.spec.thresholds:
            raise SpecError(f"thresholds have shape {tuple(t.shape)}, but {self.spec} has "
                            f"{'(C, m)' if self.spec.per_channel else '(m,)'}, "
                            f"m = {self.spec.thresholds}")
        if not torch.isfinite(t).all() or not (t[..., 1:] > t[..., :-1]).all():
            raise SpecError(f"thresholds must be finite and strictly ascending: {t.tolist()}")
        if (2 * zero) % 1:
            raise SpecError(f"zero={zero} must be a multiple of 1/2")
        if width is None:
            width = torch.where(t[..., 0] > 0, 2 * t[..., 0], size) if zero == 0 else size
        self._start_from(t, size, _per_row(width, rows, device, "width"),
                         torch.tensor(float(zero), device=device))

    @property
    def thresholds(self) -> Tensor:
        """Return the thresholds, (m,) or (C, m), ascending."""
        if not self.spec.dynamic:
            return self.base
        # What is learned is added, so that untrained thresholds are those it starts from, exactly.
        grown = (1 - GAP_FLOOR) * (self.base[..., 1:] - self.base[..., :-1]) * self.log_gaps.expm1()
        shift = (self.base_step * self.shift).unsqueeze(-1)
        return self.base + torch.cat([shift, shift + grown.cumsum(-1)], -1)

    @property
    def step(self) -> Tensor:
        """Return the distance of two levels, () or (C,)."""
        return self.base_step * self.log_step.exp() if self.spec.dynamic else self.base_step

    @property
    def zero(self) -> float:
        """Return the level that is 0."""
        return float(self.zero_level)

    def _window(self, thresholds: Tensor) -> Tensor:
        """Return the window at 1 bit: 2 t_1 where learned t_1 is well above 0, else calibrated."""
        if not self.spec.dynamic or thresholds.shape[-1] > 1:
            return self.base_width
        first = thresholds[..., 0].detach()
        free = (self.zero_level == 0) & (first > 0.1 * self.base_width)
        return torch.where(free, 2 * first, self.base_width)

    def forward(self, x: Tensor, value: Tensor | None = None) -> Tensor:
        """Return q(f(x)), in x's shape, type and memory order.

        Args:
            x: what f is applied to.
            value: f(x), where the model has computed it already in its own way.

        Raises:
            ConversionError: torch.jit.trace runs it in training mode, or torch.onnx.export with
                dynamo=False where it writes over x.
        """
        if isinstance(x, fx.Proxy):
            # A tracer that walked in would lose the surrogate gradient: be a leaf for every tracer.
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
            answers = None if self.inplace else self._state.answers
            y = self.quantized(z) if answers is None else answers(self, z)
        if self.inplace and recording() and torch.onnx.is_in_onnx_export():
            raise ConversionError(
                "torch.onnx.export(dynamo=False) cannot hold an activation that writes over its "
                "input where that is read again",
                why="That exporter loses the write where it is read through a view.",
                fix="Build the model with inplace=False and convert it, or use dynamo=True.")
        return x.copy_(y) if self.inplace else y

    def quantized(self, z: Tensor, state: _State | None = None) -> Tensor:
        """Return q(z), or its twin's value inside :func:`soften`; state: that of before."""
        with unwatched(z):
            return self._quantized(z, self._state if state is None else state)

    def _quantized(self, z: Tensor, state: _State) -> Tensor:
        if recording() and self.training:
            raise ConversionError(
                "torch.jit.trace and the ONNX exporter built on it do not record a quantized "
                "activation in training mode",
                why="What they record has no surrogate gradient.",
                fix="Call model.eval() first; to train what is compiled, use torch.compile.")
        with unrecorded():  # also learned numbers, by operations that ONNX does not have
            t, step, zero, axis = self.thresholds, self.step, self.zero_level, self.axis
            window = self._window(t)
            if state.bits is not None:
                t, step, zero, window = resampled(t, step, zero, window, 2**state.bits - 1)
        if state.action == "soften" and state.by_image and t.shape[-1] <= MOST_SOFTENED \
                and not (spelled_out() or recording()):
            return soft_jumps(z, t.detach(), step.detach().unsqueeze(-1).expand(t.shape),
                              (-zero * step).detach(), window.detach(), state.sharpness, axis,
                              True)
        if state.action == "soften":
            return soft_staircase(z, t, step, window, zero, state.sharpness, axis)
        return staircase(z, t, step, window, zero, state.surrogate, self.gate, axis)

    @torch.no_grad()
    def levels(self, z: Tensor) -> Tensor:
        """Return the number of the level that each element of z is quantized to, 0 to m."""
        with unrecorded():
            t, ones = self.thresholds, torch.ones_like(self.step)
            zero = torch.zeros_like(self.zero_level)
        return staircase(z.detach().float(), t, ones, ones, zero, axis=self.axis).long()

    def _float(self, x: Tensor) -> Tensor:
        if type(self.function) is nn.RReLU:
            self.function.training = self.training
        y: Tensor = self.function(self._kept(x))
        return y

    def _kept(self, x: Tensor) -> Tensor:
        """Return what f may save for backward: not x itself where x is overwritten afterwards."""
        return x.clone() if self.inplace else x

    @property
    def bypassed(self) -> bool:
        """Return whether it is switched off just now: nothing needs to call it."""
        return self._state.action == "bypass"

    @property
    def softened(self) -> bool:
        """Return whether it is its smooth twin just now."""
        return self._state.action == "soften"

    @property
    def in_float(self) -> bool:
        """Return whether the float activation's value is what it gives just now."""
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
        # A float checkpoint knows nothing of staircases: then this one keeps its values. One with
        # only some of the keys is damaged, and strict loading says so.
        if any(key.startswith(prefix) for key in state_dict):
            base = state_dict.get(f"{prefix}base")
            if self.spec.per_channel and base is not None and base.shape[0] != self.base.shape[0]:
                self._start_from(base, base[..., 0], base[..., 0], self.zero_level)
            super()._load_from_state_dict(state_dict, prefix, *args)


def _per_row(value: Tensor | float, rows: torch.Size, device: torch.device, name: str) -> Tensor:
    """Return one positive number, or one per row, in the shape of rows."""
    size = torch.as_tensor(value, dtype=torch.float32, device=device)
    if size.numel() == 1:
        size = size.reshape(()).expand(rows)
    if size.shape != rows:
        raise SpecError(f"{name} has shape {tuple(size.shape)}, expected one number"
                        + (f" or {tuple(rows)}" if rows else ""))
    if not torch.isfinite(size).all() or not (size > 0).all():
        raise SpecError(f"{name} must be positive: {size.tolist()}")
    return size


def staircases(model: nn.Module) -> dict[str, QuantActivation]:
    """Return every staircase of model by its full name, but for those held in float."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, QuantActivation) and not m.exempt}
