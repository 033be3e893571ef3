"""Find every activation site of a model: pure, printable, nothing of the model changes.

A site is one call of an activation in somebody's ``forward``. Modules are traced one at a time
with torch.fx, their children as leaves: the user's model stays the container, and what torch.fx
cannot trace is only ever one module's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from .activation import QuantActivation
from .calls import Identity, is_gate, named_calls, own_name
from .discovery import Intercepted, discover
from .errors import ConversionError
from .kinds import (
    ALWAYS_KEPT,
    GATES,
    MODULE_KINDS,
    always_kept,
    kind_of,
    module_of,
    overwrites,
)
from .plan import Plan, Site, join
from .tracing import Traced, planned_graphs

# Calls whose result is a tensor of its own: writing into it is seen by nobody else.
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.LayerNorm,
                  nn.GroupNorm)
_FRESH_FUNCTIONS = {"add", "sub", "mul", "truediv", "cat", "matmul", "conv1d", "conv2d", "conv3d",
                    "linear", "batch_norm", "layer_norm", "group_norm"}
# Forwards of torch's own that cannot be traced, with fused paths of their own: what they call is
# known beforehand.
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CLOSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"  # named, since torchvision is slow to import
_NO_CALL: Identity = ("", "", 0)
_PASS_THROUGH = (nn.Dropout, nn.Dropout2d, nn.Identity)


class _Reader:
    """Read a model module by module; holds the graphs, which several questions share."""

    def __init__(self, model: nn.Module, graphs: bool, unread: Mapping[str, str]) -> None:
        self.model = model
        self.traced: dict[str, list[Traced]] = {}
        self.unread = dict(unread)
        for path, module in model.named_modules():
            if type(module) in MODULE_KINDS or not _has_own_code(module) or path in unread:
                continue
            if not graphs and not _is_torchs(module):
                self.unread[path] = "its graph is not what it computes"
                continue
            try:
                self.traced[path] = list(planned_graphs(module).values())
            except Exception as error:
                self.unread[path] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.graphs = {path: [t.graph for t in traced] for path, traced in self.traced.items()}
        self.outputs = set(self._output_modules(""))
        self.called = self._called()

    def _called(self) -> set[str]:
        """Return the modules that are called as a whole.

        One that its parent only iterates over (a Sequential may be) runs no forward of its own.
        """
        found: set[str] = set()
        waiting = [""]
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            found.add(path)
            for graph in self.graphs.get(path, ()):
                waiting += [join(path, str(node.target)) for node in graph.nodes
                            if node.op == "call_module"]
            if path in self.unread:  # it may call anything
                waiting += [name for name, _ in self.model.named_modules()
                            if name.startswith(path + ".") or not path]
        return found

    def _output_modules(self, path: str) -> Iterator[str]:
        """Yield the modules whose result is, unchanged, the model's."""
        yield path
        for graph in self.graphs.get(path, ()):
            for node in graph.nodes:
                if node.op == "output" and isinstance(node.args[0], fx.Node) \
                        and node.args[0].op == "call_module":
                    yield from self._output_modules(join(path, str(node.args[0].target)))

    def statistics(self, path: str, node: fx.Node) -> tuple[str, ...]:
        """Return the BatchNorms whose outputs, added, are node's value; () if others mix in."""
        module = self.model.get_submodule(path)
        if node.op == "call_module":
            target = join(path, str(node.target))
            child = self.model.get_submodule(target)
            if _is_batchnorm(child):
                return (target,)
            if isinstance(child, _PASS_THROUGH) and isinstance(node.args[0], fx.Node):
                return self.statistics(path, node.args[0])
            for graph in self.graphs.get(target, ())[:1]:  # eval mode
                result = next(n for n in graph.nodes if n.op == "output").args[0]
                if isinstance(result, fx.Node):
                    return self.statistics(target, result)
            return ()
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name == "batch_norm" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return (path,)
        if name in ("add", "add_", "iadd") and not node.kwargs and len(node.args) == 2:
            parts = [self.statistics(path, a) if isinstance(a, fx.Node) else () for a in node.args]
            return parts[0] + parts[1] if all(parts) else ()
        return ()

    def axis(self, path: str, node: fx.Node) -> int:
        """Return the channel dimension of node's value: last after a Linear or LayerNorm."""
        if node.op == "call_module":
            child = self.model.get_submodule(join(path, str(node.target)))
            if isinstance(child, (nn.Linear, nn.LayerNorm)):
                return -1
        return 1

    def is_private(self, path: str, node: Any, reader: fx.Node) -> bool:
        """Return whether overwriting node's value is seen by nobody but reader."""
        if not isinstance(node, fx.Node) or set(node.users) != {reader}:
            return False
        if node.op == "call_module":
            child = self.model.get_submodule(join(path, str(node.target)))
            return isinstance(child, _FRESH_MODULES)
        return node.op == "call_function" and \
            getattr(node.target, "__name__", "") in _FRESH_FUNCTIONS


def _has_own_code(module: nn.Module) -> bool:
    """Return whether module's forward may call activations: containers and foreign classes."""
    if isinstance(module, QuantActivation):
        return False
    forward = getattr(type(module), "forward", None)
    if forward is None or forward is nn.Module.forward or isinstance(module, _CLOSED):
        return False
    return not _is_torchs(module) or type(module) is nn.PReLU or bool(list(module.children()))


def _is_batchnorm(module: nn.Module) -> bool:
    if f"{type(module).__module__}.{type(module).__name__}" == _FROZEN:
        return True
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and \
        type(module).forward is nn.modules.batchnorm._BatchNorm.forward


def find_sites(model: nn.Module, example: Any = None,
               known: Mapping[str, list[Intercepted]] | None = None,
               unread: Mapping[str, str] | None = None, graphs: bool = True) -> Plan:
    """Find every site of model, none of them given a staircase yet.

    Args:
        example: an input, for forwards that cannot be traced; None: one that the model accepts is
            looked for.
        known: what such forwards call, where it was found before: by module.
        unread: the forwards that were not traced then, and why; the others were.
        graphs: whether to trust graphs; False: every forward that is not torch's own is run.
    """
    reader = _Reader(model, graphs, unread or {})
    sites: list[Site] = []
    seen: set[str] = set()
    for path, traced in reader.traced.items():
        if path in reader.called:
            sites += _traced_sites(reader, path, traced, seen)
    foreign = {path: why for path, why in reader.unread.items()
               if not _is_torchs(model.get_submodule(path))}
    run_time = [path for path in foreign if not _is_layer(model.get_submodule(path))]
    if known is None and run_time:
        known, example = discover(model, run_time, reader.outputs, example)
    for path, found in (known or {}).items():
        sites += _intercepted_sites(model, path, found, seen)
    for path in reader.unread:
        if _is_layer(model.get_submodule(path)):
            sites += _layer_sites(model.get_submodule(path), path)
    sites += _module_sites(model, reader, seen)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites.sort(key=lambda site: order[site.owner])
    return Plan(tuple(sites), foreign, example)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and type(module).forward in [c.forward for c in _LAYERS]


def _layer_sites(layer: nn.Module, path: str) -> Iterator[Site]:
    """Yield the activation that a transformer layer keeps as a function in an attribute."""
    kind = kind_of(layer.__dict__.get("activation"))
    module = module_of(kind, (None,), {}, ()) if kind is not None else None
    if kind is not None and module is not None:
        yield Site(join(path, "activation"), path, kind, "attribute", "activation", 1, _NO_CALL,
                   "", module, axis=-1)


def _traced_sites(reader: _Reader, path: str, traced: list[Traced],
                  seen: set[str]) -> Iterator[Site]:
    """Yield the sites of a forward that torch.fx has traced."""
    model = reader.model
    owner = model.get_submodule(path)
    for call, called, number in named_calls(owner, traced):
        node, source = call.node, call.source
        child = model.get_submodule(join(path, call.target)) if call.target else None
        name = _free_name(path, called, call.target, seen)
        returned = bool(node.users) and all(user.op == "output" for user in node.users)
        writes = bool(getattr(child, "inplace", False)) if child is not None else \
            overwrites(node.target, node.args, node.kwargs)
        known = source is not None and type(call.function) is not nn.Identity
        where = node.meta.get("where", "")
        yield Site(
            name, path, call.kind, call.form, call.target, number, call.identity,
            where, call.function,
            writes and not reader.is_private(path, call.overwritten, node),
            reader.statistics(path, source) if source is not None and known else (),
            reader.axis(path, source) if source is not None else 1, None,
            _reason(call.kind, where, returned, path in reader.outputs, is_gate(node)))


def _reason(kind: str, where: str, returned: bool, is_output: bool, gate: bool) -> str:
    """Return why a call is kept, or nothing."""
    if returned and is_output:
        return "model output"
    if always_kept(kind, where):
        return always_kept(kind, where)
    if kind in GATES and gate:
        return "gate"
    return "gate, perhaps: its caller gets it" if kind in GATES and returned else ""


def _free_name(path: str, name: str, target: str, seen: set[str]) -> str:
    """Return the full name of a staircase, and take it."""
    full = join(path, name)
    if full in seen:  # somebody else's forward calls the very same child
        # It stands in this module: others may go through that child's siblings.
        full = join(path, f"{name.replace('.', '_')}_by_{path.replace('.', '_') or 'model'}")
    seen.add(full)
    if target:
        seen.add(join(path, target))
    return full


def _intercepted_sites(model: nn.Module, path: str, found: list[Intercepted],
                       seen: set[str]) -> Iterator[Site]:
    """Yield the sites of a forward whose calls are told apart at run time."""
    counts: dict[str, int] = {}
    owner = model.get_submodule(path)
    for call in found:
        stem = call.target or call.kind
        counts[stem] = number = counts.get(stem, 0) + 1
        name = own_name(owner, call.target, call.kind, number)
        child: Any = owner.get_submodule(call.target) if call.target else None
        yield Site(_free_name(path, name, call.target, seen), path, call.kind, call.form,
                   call.target, number, call.identity, call.where, call.function if child is None
                   else child, call.inplace if child is None else
                   bool(getattr(child, "inplace", False)),
                   reason=call.reason, intercepted=True, argument=call.argument,
                   parts=call.parts)


def _module_sites(model: nn.Module, reader: _Reader, seen: set[str]) -> Iterator[Site]:
    """Yield the modules that no forward was seen to call, and those that are closed."""
    for path, module in model.named_modules():
        kind = MODULE_KINDS.get(type(module))
        owner, _, name = path.rpartition(".")
        if isinstance(module, _CLOSED):
            attention = isinstance(module, nn.MultiheadAttention)
            yield Site(path, owner, "attention" if attention else "rnn", "module", name, 1,
                       _NO_CALL, "", nn.Identity(),
                       reason="attention softmax" if attention else "fused cell")
        if kind is None or path in seen:
            continue
        # A forward that was run and did not call it may do so for other inputs.
        opaque = any(not above or path.startswith(above + ".") for above in reader.unread)
        yield Site(path, owner, kind, "opaque", name, 1, _NO_CALL, "", module,
                   bool(getattr(module, "inplace", False)),
                   reason=ALWAYS_KEPT.get(kind, "") if opaque else "never called")


def check_convertible(model: Any) -> None:
    """Refuse what is no float nn.Module.

    Raises:
        ConversionError: not a module, a ScriptModule, or one converted already.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or any(
            isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ConversionError("the model is, or holds, a ScriptModule, whose forward is compiled",
                              fix="Convert the original Python model, then script it.")
    done = [name for name, m in model.named_modules() if isinstance(m, QuantActivation)]
    if done:
        raise ConversionError(f"the model is converted already: {done[0]!r} is a QuantActivation",
                              fix="To convert it differently, start from the float model: its "
                                  "file, or quantguard.restore(model).")
