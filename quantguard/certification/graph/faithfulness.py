"""Comparison of a forward with its graph, operation by operation.

A graph is traced on symbols, and a forward may behave differently on symbols than on tensors. So
both are run on the same images: the operations on whatever depends on the images must be the same,
with the same constants to the bit, and none of them may hand values to Python, which could branch
on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.forward_state import digest, library, profiled
from ...core.runtime import seeded

# Tags of operations on whose results, or shapes of results, Python may branch.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Attributes that read a tensor's memory without an operation.
_READS = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "const_data_ptr", "storage",
          "untyped_storage", "_typed_storage", "__reduce_ex__", "__deepcopy__", "apply_", "map_",
          "map2_"}
# Operations that overwrite their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_"}


class _ImageMemory:
    """Numbers of the memory blocks that hold values computed from the images, in order of use.

    Views share a block, so that no write in place, custom function or ``.data`` goes unnoticed. The
    tensors are kept alive, so that no other tensor gets the same memory.
    """

    def __init__(self, images: Tensor) -> None:
        self.numbers: dict[Any, int] = {}
        self.alive: list[Any] = []
        self.add(images)

    def add(self, x: Tensor) -> None:
        place = _storage_of(x)
        if place not in self.numbers:
            self.numbers[place] = len(self.numbers)
            self.alive.append(x)

    def describe(self, values: Any, overwritten: Sequence[Any] = ()) -> tuple[list[Any], bool]:
        """Return a description of an operation's arguments, and whether any depends on the images.

        Those that do are described by their memory and the view into it, constants by their bits.

        Args:
            overwritten: tensors that are overwritten: what they held does not matter.
        """
        found: list[Any] = []

        def add(value: Any) -> None:
            if not isinstance(value, Tensor):
                found.append(repr(value))
            elif _storage_of(value) in self.numbers:
                found.append((self.numbers[_storage_of(value)], *_view_of(value)))
            else:
                found.append(value)
        fx.node.map_aggregate(values, add)
        if not any(isinstance(v, tuple) for v in found):
            return [], False
        return [v if not isinstance(v, Tensor)
                else "overwritten" if any(v is x for x in overwritten)
                else digest(v) for v in found], True


def _storage_of(x: Tensor) -> Any:
    with torch._C.DisableTorchFunction():  # this read is not one of the model's
        return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _view_of(x: Tensor) -> tuple[Any, ...]:
    shape = tuple(x.shape), str(x.dtype)
    return (*shape, x.stride(), x.storage_offset()) if x.layout is torch.strided else shape


class OperationRecorder:
    """Record of the operations on images, and on what is computed from them.

    Attributes:
        operations: names and described arguments, in order.
        reads: operations that hand values to Python; see ``in_layer``.
        in_layer: set while a known layer or quantizer runs; these may read values.
    """

    def __init__(self, images: Tensor) -> None:
        self.memory = _ImageMemory(images)
        self.operations: list[tuple[str, list[Any]]] = []
        self.reads: list[str] = []
        self.in_layer = False

    @contextmanager
    def recording(self, grad: bool = False) -> Iterator[None]:
        """Record everything that is computed inside this context."""
        with _DispatchRecorder(self), _ReadRecorder(self), torch.set_grad_enabled(grad), \
                seeded(0), profiled(self._called):
            yield

    def _called(self, frame: Any, event: str, function: Any) -> None:
        """Record reads that no mode sees, because a mode itself has called the code."""
        if event == "c_call" and getattr(function, "__name__", "") in _READS:
            owner = function.__self__
            if isinstance(owner, Tensor) and not library(frame.f_code.co_filename):
                self.add(function.__name__, (owner,), True)

    def add_result(self, value: Any) -> None:
        """Record which of the computed values is returned."""
        self.operations.append(("its answer", self.memory.describe(value)[0]))

    def add(self, name: str, args: Any, reads: bool, overwritten: Sequence[Any] = ()) -> bool:
        """Record an operation; return whether any of its arguments depends on the images."""
        described, depends = self.memory.describe(args, overwritten)
        if depends:
            self.operations.append((name, described))
            if reads and not self.in_layer:
                self.reads.append(name)
        return depends


class _DispatchRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: OperationRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        everything = (args, kwargs or {})
        name = function.overloadpacket.__name__
        written = args[:1] if name in _OVERWRITES else [
            (kwargs or {}).get(a.name) for a in function._schema.arguments
            if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write]
        depends = self.recorder.add(name, everything, bool(_TAGS & set(function.tags)), written)
        result = function(*args, **(kwargs or {}))
        if depends:  # an operation without a result writes into its arguments
            fx.node.map_aggregate(everything if result is None else result, lambda v:
                                  self.recorder.memory.add(v) if isinstance(v, Tensor) else None)
        return result


class _ReadRecorder(TorchFunctionMode):
    def __init__(self, recorder: OperationRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS:
            self.recorder.add(name, (args, kwargs or {}), True)
        return function(*args, **(kwargs or {}))


class _RecordedGraph(fx.Interpreter):
    """A graph that runs, and notes the first of its calls that hands values to Python."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recorder: OperationRecorder) -> None:
        super().__init__(root, graph=graph)
        self.recorder = recorder
        self.reader: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.in_layer = n.op == "call_module"
        result = super().run_node(n)
        if self.recorder.reads and self.reader is None:
            self.reader = n
        return result


def first_difference(forward: Callable[[Tensor], Any], root: nn.Module, graph: fx.Graph,
                     images: Tensor, name_of: Callable[[fx.Node], str],
                     grad: bool = False) -> str | None:
    """Return a sentence about the first operation where a forward leaves its graph, or None.

    Args:
        forward: the function that was traced.
        root, graph: its trace.
        images: (N, ...), some of them.
        name_of: returns a node's name.
        grad: whether torch's gradients are enabled, which a forward may query.
    """
    run = _RecordedGraph(root, graph, OperationRecorder(images := images.clone()))
    with run.recorder.recording(grad):
        run.recorder.add_result(run.run(images))
    if run.reader is not None:
        return f"{name_of(run.reader)} hands values to Python, which may branch on them."
    recorder = OperationRecorder(images := images.clone())
    with recorder.recording(grad):
        recorder.add_result(forward(images))
    for own, traced in zip_longest(recorder.operations, run.recorder.operations):
        if own != traced:
            names = ["nothing" if found is None else found[0] for found in (own, traced)]
            other = " of something else" if names[0] == names[1] else ""
            return (f"The next operation of the model that runs is {names[0]}, and that of its "
                    f"trace is {names[1]}{other}.")
    return None
