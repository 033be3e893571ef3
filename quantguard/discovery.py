"""Find the activation calls of forwards that torch.fx cannot hold, by running them."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activation import QuantActivation
from .calls import RESHAPES, Identity
from .example import find_example
from .interception import CALL, Inside
from .kinds import (
    ALWAYS_KEPT,
    GATES,
    MODULE_KINDS,
    always_kept,
    kind_of,
    module_of,
    overwrites,
)
from .running import changed, device_of, duplicate, on_meta, run, seeded, to_device
from .shadow import Spelled, TensorShadows, operation

_TO_PLAIN = frozenset((Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
                       Tensor.item, Tensor.tolist))
_SPELLING = frozenset(("clamp", "clamp_", "clamp_min", "clip", "maximum", "masked_fill"))
NOT_REACHED = "not reached by the example"
_UNSEEN = "gate, perhaps: no graph shows where it goes"


class Intercepted(NamedTuple):
    """Describe one activation call that was seen while a forward ran.

    Attributes:
        form: ``function`` (a staircase is called instead), ``spelled`` (a staircase is called
            after it) or ``module`` (an activation module is called).
        argument: for ``spelled``, which argument the activation is a function of; None: none.
        parts: for ``spelled``, the calls of activations that are only parts of it.
        reason: why it is kept.
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


class _Log:
    """Collect what the runs of one module's forward have shown."""

    def __init__(self) -> None:
        self.seen: dict[Identity, Intercepted] = {}
        self.passed: set[tuple[str, str]] = set()  # operation, function and line
        self.decides = False  # a tensor became a plain value, which may decide on a branch

    @property
    def could_convert(self) -> bool:
        """Return whether anything was seen that is not kept anyway."""
        return any(not always_kept(call.kind, call.where) for call in self.seen.values())


class _Recorder(Inside):
    """Note the activation calls of one forward, letting everything run in float."""

    def __init__(self, owner: nn.Module, frame: types.FrameType, log: _Log) -> None:
        super().__init__(owner, frame)
        self.log, self.seen = log, log.seen
        self.shadows = TensorShadows()
        self.results: dict[int, Identity] = {}  # number of a value -> the call that gave it
        self._children = children_of(owner)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key, kind = operation(func), kind_of(func)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if key == "mul":
            self._multiplied(inputs)
        result = func(*args, **kwargs)
        stands = self.stands(key)
        if stands is not None:
            self.log.decides |= func in _TO_PLAIN
            self.log.passed |= {(key, part.rpartition(":")[0])
                                for part in stands[0][1].split("<")}
        if not isinstance(result, Tensor):
            return result
        if stands is None:
            self._module_call(func, kind, result)
            return result
        spelled = self.shadows.ran(result, func, args, kwargs)
        if key in RESHAPES:
            self._passed_on(inputs, result)
        if kind is None and spelled is None:
            return result
        identity, where = stands
        if kind is not None:
            function = None if kind in ALWAYS_KEPT else module_of(kind, args, kwargs, Tensor)
            found = Intercepted(identity, kind, "spelled" if function is None else "function", "",
                                function or nn.Identity(), where, 0 if args else None,
                                overwrites(func, args, kwargs))
        else:
            assert spelled is not None
            found = self._spelled(identity, where, spelled, func, args, kwargs)
        found = found._replace(reason=always_kept(found.kind, where) or (
            _UNSEEN if found.kind in GATES else ""))
        if _in_checkpoint(self.frame):
            found = found._replace(reason=found.reason or "inside a checkpoint, run again later")
        self.seen.setdefault(identity, found)
        self.results[self.shadows.number(result)] = identity
        return result

    def _spelled(self, identity: Identity, where: str, spelled: Spelled, func: Any,
                 args: tuple[Any, ...], kwargs: dict[str, Any]) -> Intercepted:
        parts: list[Identity] = []
        for number in sorted(spelled.through & self.results.keys()):
            part = self.seen.pop(self.results[number], None)
            parts += [self.results[number], *(part.parts if part is not None else ())]
        inplace = overwrites(func, args, kwargs)
        roots = [i for i, a in enumerate(args) if isinstance(a, Tensor)
                 and not self.shadows.is_constant(a) and self.shadows.number(a) == spelled.root]
        known = bool(roots) and not inplace
        return Intercepted(identity, spelled.kind, "spelled", "",
                           spelled.function if known else nn.Identity(), where,
                           roots[0] if known else None, inplace, "", tuple(dict.fromkeys(parts)))

    def _module_call(self, func: Any, kind: str | None, result: Tensor) -> None:
        """Note a call of an activation module, which is seen by the function that it calls."""
        if kind is None:
            return
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not CALL:
            frame = frame.f_back
        child = None if frame is None else self._children.get(id(frame.f_locals.get("self")))
        if child is None:
            return
        name, module = child
        stands = self.stands(name, 3, module)
        if stands is not None:
            self.seen.setdefault(stands[0], Intercepted(stands[0], kind, "module", name, module,
                                                        stands[1]))
            self.results[self.shadows.number(result)] = stands[0]

    def _call_of(self, value: Tensor) -> Identity | None:
        return None if self.shadows.is_constant(value) else \
            self.results.get(self.shadows.number(value))

    def _passed_on(self, inputs: list[Tensor], result: Tensor) -> None:
        identity = self._call_of(inputs[0]) if inputs else None
        if identity is not None:
            self.results[self.shadows.number(result)] = identity

    def _multiplied(self, inputs: list[Tensor]) -> None:
        for value in inputs:
            identity = self._call_of(value)
            if identity in self.seen and self.seen[identity].kind in GATES:
                self.seen[identity] = self.seen[identity]._replace(reason="gate")

    def returned(self, output: Any, is_output: bool) -> None:
        """Note what the forward returned."""
        identity = self._call_of(output) if isinstance(output, Tensor) else None
        if is_output and identity in self.seen:
            self.seen[identity] = self.seen[identity]._replace(reason="model output")


def _in_checkpoint(last: types.FrameType) -> bool:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame is not last:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def discover(model: nn.Module, paths: Iterable[str], outputs: Iterable[str], inputs: Any,
             ) -> tuple[dict[str, list[Intercepted]], Any]:
    """Run a copy of model; return the activation calls in the forwards named by paths, and inputs.

    Run in both modes; with the inputs negated, zero and larger, too, where data decides on branches
    and loops of a forward with activations in it. A copy without numbers is tried first: it costs
    nothing, but cannot decide on branches.

    Args:
        inputs: what model accepts; None: that is looked for, and what is run to be tried is
            watched at once.
    """
    classes = {path: type(model.get_submodule(path)) for path in paths}
    outputs = set(outputs)
    logs: dict[str, _Log] = {}

    def look(twin: nn.Module, inputs: Any) -> bool:
        logs.update((path, _Log()) for path in classes)
        return _watched(twin, classes, logs, outputs, inputs)

    if inputs is None:
        inputs = find_example(model, look)
        if inputs is None:
            return {}, None
    elif not look(on_meta(model), to_device(inputs, torch.device("meta"))):
        look(duplicate(model), to_device(inputs, device_of(model)))
    return {path: [*log.seen.values(), *_named_unreached(model.get_submodule(path), log)]
            for path, log in logs.items()}, inputs


def _watched(twin: nn.Module, classes: Mapping[str, type[nn.Module]], logs: Mapping[str, _Log],
             outputs: set[str], inputs: Any) -> bool:
    """Run twin, filling the logs; return whether it could be run."""
    def recording(cls: type[nn.Module], path: str) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            recorder = _Recorder(self, sys._getframe(0), logs[path])
            with recorder:
                result = cls.forward(self, *args, **kwargs)
            recorder.returned(result, path in outputs)
            return result
        return forward

    for path, cls in classes.items():
        twin.get_submodule(path).__class__ = type(cls.__name__, (cls,), {
            "forward": recording(cls, path), "__module__": cls.__module__})
    by_grad = any(_reads_grad(cls.forward) for cls in classes.values())
    ran = False
    for change in (Tensor.clone, _times(-1), _times(0), _times(100), _times(-100)):
        asked: list[bool] = []
        for training, grad in ((False, False), (True, False), (False, True)):
            if grad and not (by_grad or asked):
                continue
            twin.train(training)
            with suppress(Exception), torch.set_grad_enabled(grad), seeded(0), _noting(asked):
                run(twin, changed(inputs, change))
                ran = ran or not training
        # Elsewhere the data decides on nothing that matters here.
        if not ran or not any(log.decides and (log.could_convert or any(_unreached(
                twin.get_submodule(path), classes[path], log))) for path, log in logs.items()):
            break
    return ran


def _reads_grad(function: Any) -> bool:
    """Return whether a forward may depend on gradients otherwise than by torch.is_grad_enabled."""
    return any("grad" in name and "gradient" not in name
               and (name != "is_grad_enabled" or name in part.__globals__)
               for part in _functions(function) for name in part.__code__.co_names)


@contextmanager
def _noting(asked: list[bool]) -> Iterator[None]:
    """Note whether anybody but torch itself calls torch.is_grad_enabled."""
    before = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
            asked.append(True)
        return before()

    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = before


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor if x.is_floating_point() else x.clone()


class _Candidate(NamedTuple):
    """Hold a place in the source that may compute an activation; kind where it names one."""

    key: str
    place: str
    where: str
    kind: str | None


def _candidates(cls: type[nn.Module]) -> Iterator[_Candidate]:
    """Yield the places in the methods of cls that name or may spell out an activation."""
    functions: dict[str, list[types.FunctionType]] = {}
    for c in cls.__mro__:
        for name, f in vars(c).items() if not c.__module__.startswith("torch.") else ():
            above = functions.setdefault(name, []) if isinstance(f, types.FunctionType) else None
            if above is not None and all(_calls_super(g) for g in above):
                above.append(f)
    for name, found in functions.items():
        if not name.startswith("__"):
            for function in found:
                for part in _functions(function):
                    yield from _candidates_in(part.__code__)


def _functions(function: Any) -> Iterator[types.FunctionType]:
    """Yield a function, and those that it is a decorated form of."""
    while function is not None:
        if isinstance(function, types.FunctionType):
            yield function
        function = getattr(function, "__wrapped__", None)


def _calls_super(function: types.FunctionType) -> bool:
    return any("super" in part.__code__.co_names for part in _functions(function))


@functools.lru_cache(4096)
def _candidates_in(code: types.CodeType) -> tuple[_Candidate, ...]:
    """Return the places in one function's code, whose instructions are read only if need be."""
    called = {name: kind for name in code.co_names
              if (kind := _kind_named(name)) or name in _SPELLING}
    operations = set(code.co_code[::2])
    if not called and not {dis.opmap["COMPARE_OP"], dis.opmap["BINARY_OP"]} <= operations:
        return ()
    found: list[_Candidate] = []
    file = code.co_filename.replace("\\", "/").split("/")
    lines: dict[int, set[str]] = {}
    for step in dis.get_instructions(code):
        line = step.positions.lineno if step.positions is not None else None
        if line is not None:
            named = step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")
            lines.setdefault(line, set()).add(
                str(step.argval) if named else step.opname + str(step.argrepr))
    for line, names in lines.items():
        place = f"{code.co_name}+{line - code.co_firstlineno}"
        where = f"{'/'.join(file[-2:])}:{line}"
        for name in names & called.keys():
            found.append(_Candidate(operation(name), place, where, called[name]))
        if names & {"BINARY_OP*", "BINARY_OP*="} and any(
                name.startswith("COMPARE_OP") for name in names):
            found.append(_Candidate("mul", place, where, None))
    return tuple(found)


def _kind_named(name: str) -> str | None:
    """Return the kind that is converted and that a name in somebody's code may stand for.

    The name may be anything: ``__dict__``, ``Tensor`` and ``math`` are in torch's module, too.
    """
    kind = kind_of(name) or kind_of(getattr(nn.functional, name, None))
    return None if kind in ALWAYS_KEPT else kind


def _unreached(module: nn.Module, cls: type[nn.Module], log: _Log) -> Iterator[_Candidate]:
    """Yield the places that nothing passed; a child's name is no function's."""
    for candidate in _candidates(cls):
        if (candidate.key, candidate.place) not in log.passed \
                and not hasattr(module, candidate.key):
            yield candidate


def _named_unreached(module: nn.Module, log: _Log) -> Iterator[Intercepted]:
    for key, place, where, kind in _unreached(module, type(module), log):
        if kind is not None:
            yield Intercepted((key, place, 1), kind, "function", "", nn.Identity(), where,
                              reason=NOT_REACHED)
