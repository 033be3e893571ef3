"""Find the activation calls of forwards that torch.fx cannot trace, by running them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model_calls import run
from ..core.module_utils import duplicate, on_meta
from ..core.nested_tensors import changed, device_of, to_device
from ..core.runtime import seeded
from .example_input import find_example
from .runtime_recorder import Intercepted, Recorder, RunLog
from .source_candidates import functions_of, unreached

NOT_REACHED = "not reached by the example"


def discover(model: nn.Module, paths: Iterable[str], outputs: Iterable[str], inputs: Any,
             ) -> tuple[dict[str, list[Intercepted]], Any]:
    """Run a copy of model and record its activation calls.

    The copy runs in both modes. If data chooses branches or loops of a forward with activations,
    it also runs on negated, zero and enlarged inputs. A copy on the meta device is tried first:
    it costs nothing, but cannot choose branches by data.

    Args:
        paths: the modules whose forwards are recorded.
        outputs: the modules whose result is the output of the model.
        inputs: inputs of model; None: an example is searched for, and recorded in the same run.

    Returns:
        The calls by module, and the inputs; no calls and None if no example was found.
    """
    classes = {path: type(model.get_submodule(path)) for path in paths}
    outputs = set(outputs)
    logs: dict[str, RunLog] = {}

    def record(clone: nn.Module, inputs: Any) -> bool:
        logs.update((path, RunLog()) for path in classes)
        return _recorded(clone, classes, logs, outputs, inputs)

    if inputs is None:
        inputs = find_example(model, record)
        if inputs is None:
            return {}, None
    elif not record(on_meta(model), to_device(inputs, torch.device("meta"))):
        record(duplicate(model), to_device(inputs, device_of(model)))
    return {path: [*log.calls.values(), *_named_unreached(model.get_submodule(path), log)]
            for path, log in logs.items()}, inputs


def _recorded(clone: nn.Module, classes: Mapping[str, type[nn.Module]],
              logs: Mapping[str, RunLog], outputs: set[str], inputs: Any) -> bool:
    """Run a copy of a model and fill the logs; return whether it could be run."""
    def recording(cls: type[nn.Module], path: str) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            recorder = Recorder(self, sys._getframe(0), logs[path])
            with recorder:
                result = cls.forward(self, *args, **kwargs)
            recorder.returned(result, path in outputs)
            return result
        return forward

    for path, cls in classes.items():
        clone.get_submodule(path).__class__ = type(cls.__name__, (cls,), {
            "forward": recording(cls, path), "__module__": cls.__module__})
    by_grad = any(_reads_grad(cls.forward) for cls in classes.values())
    ran = False
    for change in (Tensor.clone, _times(-1), _times(0), _times(100), _times(-100)):
        reads: list[bool] = []
        for training, grad in ((False, False), (True, False), (False, True)):
            if grad and not (by_grad or reads):
                continue
            clone.train(training)
            with suppress(Exception), torch.set_grad_enabled(grad), seeded(0), _grad_reads(reads):
                run(clone, changed(inputs, change))
                ran = ran or not training
        # Other inputs matter only if data chooses a branch of a forward with activations.
        if not ran or not any(log.chooses_branches and (log.could_convert or any(unreached(
                clone.get_submodule(path), classes[path], log))) for path, log in logs.items()):
            break
    return ran


def _reads_grad(function: Any) -> bool:
    """Return whether a forward may read the grad mode in a way that _grad_reads does not see."""
    return any("grad" in name and "gradient" not in name
               and (name != "is_grad_enabled" or name in part.__globals__)
               for part in functions_of(function) for name in part.__code__.co_names)


@contextmanager
def _grad_reads(reads: list[bool]) -> Iterator[None]:
    """Record whether any code outside torch calls torch.is_grad_enabled."""
    before = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
            reads.append(True)
        return before()

    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = before


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor if x.is_floating_point() else x.clone()


def _named_unreached(module: nn.Module, log: RunLog) -> Iterator[Intercepted]:
    for key, place, where, kind in unreached(module, type(module), log):
        if kind is not None:
            yield Intercepted((key, place, 1), kind, "function", "", nn.Identity(), where,
                              reason=NOT_REACHED)
