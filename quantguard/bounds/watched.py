"""What a model does with its images, operation by operation: a forward beside its graph.

A graph is traced on symbols, and a forward may ask whether it is given symbols. Its operations on
what stems from the images must be those of the graph, with the same constants to the bit, and none
of them may hand values to Python, which could branch on them.
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

from ..running import seeded
from ..state import digest, library, profiled

# Operations whose results, or the shapes of them, Python may branch on.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What reads a tensor's memory without an operation.
_READS = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "const_data_ptr", "storage",
          "untyped_storage", "_typed_storage", "__reduce_ex__", "__deepcopy__", "apply_", "map_",
          "map2_"}
# Operations that overwrite their first argument whatever was there.
_OVERWRITES = {"copy_", "fill_", "zero_"}


class _Memory:
    """Number the memory that holds what stems from the images, in the order in which it is met.

    Views share it, and no write in place, custom function or ``.data`` leaves it unseen. It is
    kept while this lives, so that no other tensor gets its place.
    """

    def __init__(self, images: Tensor) -> None:
        self.numbers: dict[Any, int] = {}
        self.kept: list[Any] = []
        self.add(images)

    def add(self, x: Tensor) -> None:
        place = _place(x)
        if place not in self.numbers:
            self.numbers[place] = len(self.numbers)
            self.kept.append(x)

    def told(self, values: Any, but: Sequence[Any] = ()) -> tuple[list[Any], bool]:
        """Return the arguments of an operation, and whether some of them stem from the images.

        Those that do are told by their memory and the window into it, constants by their bits.

        Args:
            but: tensors that are overwritten: no matter what was there.
        """
        found: list[Any] = []

        def tell(value: Any) -> None:
            if not isinstance(value, Tensor):
                found.append(repr(value))
            elif _place(value) in self.numbers:
                found.append((self.numbers[_place(value)], *_window(value)))
            else:
                found.append(value)
        fx.node.map_aggregate(values, tell)
        if not any(isinstance(v, tuple) for v in found):
            return [], False
        return [v if not isinstance(v, Tensor) else "overwritten" if any(v is b for b in but)
                else digest(v) for v in found], True


def _place(x: Tensor) -> Any:
    with torch._C.DisableTorchFunction():  # this is no read of the model's
        return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _window(x: Tensor) -> tuple[Any, ...]:
    shape = tuple(x.shape), str(x.dtype)
    return (*shape, x.stride(), x.storage_offset()) if x.layout is torch.strided else shape


class Watch:
    """Record what is done to images, and to what is made of them, inside :meth:`watching`.

    Attributes:
        done: each operation and its arguments, images and what stems from them by their number.
        reads: operations that hand values to Python; see ``layer``.
        layer: set while a layer or staircase runs, which may read, for it is known what it does.
    """

    def __init__(self, images: Tensor) -> None:
        self.memory = _Memory(images)
        self.done: list[tuple[str, list[Any]]] = []
        self.reads: list[str] = []
        self.layer = False

    @contextmanager
    def watching(self, grad: bool = False) -> Iterator[None]:
        with _Operations(self), _Functions(self), torch.set_grad_enabled(grad), seeded(0), \
                profiled(self._called):
            yield

    def _called(self, frame: Any, event: str, function: Any) -> None:
        """Note methods that read a tensor where no mode sees them: in what a mode has called."""
        if event == "c_call" and getattr(function, "__name__", "") in _READS:
            owner = function.__self__
            if isinstance(owner, Tensor) and not library(frame.f_code.co_filename):
                self.saw(function.__name__, (owner,), True)

    def returned(self, value: Any) -> None:
        """Note which of what was computed is the answer."""
        self.done.append(("its answer", self.memory.told(value)[0]))

    def saw(self, name: str, args: Any, reads: bool, but: Sequence[Any] = ()) -> bool:
        """Note an operation; return whether it is done to what stems from the images."""
        told, ours = self.memory.told(args, but)
        if ours:
            self.done.append((name, told))
            if reads and not self.layer:
                self.reads.append(name)
        return ours


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        everything = (args, kwargs or {})
        name = function.overloadpacket.__name__
        written = args[:1] if name in _OVERWRITES else [
            (kwargs or {}).get(a.name) for a in function._schema.arguments
            if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write]
        ours = self.watch.saw(name, everything, bool(_TAGS & set(function.tags)), written)
        result = function(*args, **(kwargs or {}))
        if ours:  # without a result an operation writes into what it is given
            fx.node.map_aggregate(everything if result is None else result, lambda v:
                                  self.watch.memory.add(v) if isinstance(v, Tensor) else None)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS:
            self.watch.saw(name, (args, kwargs or {}), True)
        return function(*args, **(kwargs or {}))


class _Run(fx.Interpreter):
    """Run a graph; note which of its calls is the first to hand values to Python."""

    def __init__(self, root: nn.Module, graph: fx.Graph, watch: Watch) -> None:
        super().__init__(root, graph=graph)
        self.watch = watch
        self.reader: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.watch.layer = n.op == "call_module"
        result = super().run_node(n)
        if self.watch.reads and self.reader is None:
            self.reader = n
        return result


def compared(forward: Callable[[Tensor], Any], root: nn.Module, graph: fx.Graph, images: Tensor,
             named: Callable[[fx.Node], str], grad: bool = False) -> str | None:
    """Return where a forward does with images what its graph does not say, or None.

    Args:
        forward: what was traced.
        root, graph: what came out.
        images: (N, ...), some of them.
        named: names a node.
        grad: whether torch's gradients are enabled, which a forward may ask.
    """
    run = _Run(root, graph, Watch(images := images.clone()))
    with run.watch.watching(grad):
        run.watch.returned(run.run(images))
    if run.reader is not None:
        return f"{named(run.reader)} hands values to Python, which may branch on them."
    watch = Watch(images := images.clone())
    with watch.watching(grad):
        watch.returned(forward(images))
    for pair in zip_longest(watch.done, run.watch.done):
        if pair[0] != pair[1]:
            own, graphs = ("nothing" if done is None else done[0] for done in pair)
            graphs += " of something else" * (own == graphs)
            return f"Where it runs it goes on with {own}, where it is traced with {graphs}."
    return None
