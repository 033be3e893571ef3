"""Record the activation calls of one forward while it runs."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn.activation_kinds import (
    ALWAYS_EXCLUDED,
    GATES,
    MODULE_KINDS,
    always_excluded,
    kind_of,
    module_of,
    overwrites,
)
from ..nn.numeric_match import Spelled, TensorShadows, operation
from ..nn.quant_activation import QuantActivation
from .activation_calls import RESHAPES, Identity
from .runtime_dispatch import CALL, CallLocator

_TO_PLAIN = frozenset((Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
                       Tensor.item, Tensor.tolist))
_ASSUMED_GATE = "gate (assumed): no graph shows its use"


class Intercepted(NamedTuple):
    """One activation call that was recorded while a forward ran.

    Attributes:
        form: ``function`` (a quantizer is called instead), ``spelled`` (a quantizer is called
            after it) or ``module`` (an activation module is called).
        argument: for ``spelled``, the argument that the activation is a function of; None: none.
        parts: for ``spelled``, the calls of activations that are only parts of it.
        reason: why it is excluded.
    """

    identity: Identity
    kind: str
    form: str
    target: str
    function: nn.Module
    where: str
    argument: int | None = None
    inplace: bool = False
    reason: str = ""
    parts: tuple[Identity, ...] = ()


def children_of(owner: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return owner's activation modules by id: name and module."""
    return {id(m): (name, m) for name, m in owner.named_modules()
            if type(m) in MODULE_KINDS or isinstance(m, QuantActivation)}


class RunLog:
    """Record of all runs of one module's forward."""

    def __init__(self) -> None:
        self.calls: dict[Identity, Intercepted] = {}
        self.reached: set[tuple[str, str]] = set()  # operation, function and line
        self.chooses_branches = False  # a tensor became a plain value, which may choose a branch

    @property
    def could_convert(self) -> bool:
        """Return whether any recorded call could be converted."""
        return any(not always_excluded(call.kind, call.where) for call in self.calls.values())


class Recorder(CallLocator):
    """Torch-function mode that records the activation calls of a forward, run in float."""

    def __init__(self, owner: nn.Module, frame: types.FrameType, log: RunLog) -> None:
        super().__init__(owner, frame)
        self.log, self.calls = log, log.calls
        self.shadows = TensorShadows()
        self.results: dict[int, Identity] = {}  # number of a value -> the call that returned it
        self._children = children_of(owner)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key, kind = operation(func), kind_of(func)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if key == "mul":
            self._multiplied(inputs)
        result = func(*args, **kwargs)
        located = self.locate(key)
        if located is not None:
            self.log.chooses_branches |= func in _TO_PLAIN
            self.log.reached |= {(key, part.rpartition(":")[0])
                                for part in located[0][1].split("<")}
        if not isinstance(result, Tensor):
            return result
        if located is None:
            self._module_call(func, kind, result)
            return result
        spelled = self.shadows.ran(result, func, args, kwargs)
        if key in RESHAPES:
            self._reshaped(inputs, result)
        if kind is None and spelled is None:
            return result
        identity, where = located
        if kind is not None:
            function = None if kind in ALWAYS_EXCLUDED else module_of(kind, args, kwargs, Tensor)
            found = Intercepted(identity, kind, "spelled" if function is None else "function", "",
                                function or nn.Identity(), where, 0 if args else None,
                                overwrites(func, args, kwargs))
        else:
            assert spelled is not None
            found = self._spelled_out(identity, where, spelled, func, args, kwargs)
        found = found._replace(reason=always_excluded(found.kind, where) or (
            _ASSUMED_GATE if found.kind in GATES else ""))
        if _in_checkpoint(self.frame):
            found = found._replace(reason=found.reason or "inside a checkpoint, run again later")
        self.calls.setdefault(identity, found)
        self.results[self.shadows.number(result)] = identity
        return result

    def _spelled_out(self, identity: Identity, where: str, spelled: Spelled, func: Any,
                     args: tuple[Any, ...], kwargs: dict[str, Any]) -> Intercepted:
        """Return the record of a spelled-out activation, and drop those of its parts."""
        parts: list[Identity] = []
        for number in sorted(spelled.through & self.results.keys()):
            part = self.calls.pop(self.results[number], None)
            parts += [self.results[number], *(part.parts if part is not None else ())]
        inplace = overwrites(func, args, kwargs)
        roots = [i for i, a in enumerate(args) if isinstance(a, Tensor)
                 and not self.shadows.is_constant(a) and self.shadows.number(a) == spelled.root]
        known = bool(roots) and not inplace
        return Intercepted(identity, spelled.kind, "spelled", "",
                           spelled.function if known else nn.Identity(), where,
                           roots[0] if known else None, inplace, "", tuple(dict.fromkeys(parts)))

    def _module_call(self, func: Any, kind: str | None, result: Tensor) -> None:
        """Record a call of an activation module, recognised by the function that it calls."""
        if kind is None:
            return
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not CALL:
            frame = frame.f_back
        child = None if frame is None else self._children.get(id(frame.f_locals.get("self")))
        if child is None:
            return
        name, module = child
        located = self.locate(name, 3, module)
        if located is not None:
            self.calls.setdefault(located[0], Intercepted(located[0], kind, "module", name, module,
                                                        located[1]))
            self.results[self.shadows.number(result)] = located[0]

    def _call_of(self, value: Tensor) -> Identity | None:
        return None if self.shadows.is_constant(value) else \
            self.results.get(self.shadows.number(value))

    def _reshaped(self, inputs: list[Tensor], result: Tensor) -> None:
        identity = self._call_of(inputs[0]) if inputs else None
        if identity is not None:
            self.results[self.shadows.number(result)] = identity

    def _multiplied(self, inputs: list[Tensor]) -> None:
        for value in inputs:
            identity = self._call_of(value)
            if identity in self.calls and self.calls[identity].kind in GATES:
                self.calls[identity] = self.calls[identity]._replace(reason="gate")

    def returned(self, output: Any, is_output: bool) -> None:
        """Record the output of the forward."""
        identity = self._call_of(output) if isinstance(output, Tensor) else None
        if is_output and identity in self.calls:
            self.calls[identity] = self.calls[identity]._replace(reason="model output")


def _in_checkpoint(last: types.FrameType) -> bool:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame is not last:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False
