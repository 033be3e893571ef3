"""The torch.fx graphs of a model's modules, and the facts that conversion reads from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from ..nn.activation_kinds import MODULE_KINDS
from ..nn.quant_activation import QuantActivation
from .fx_tracer import Traced, planned_graphs
from .plan import join

# Calls that return a new tensor: overwriting it affects no other tensor.
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.LayerNorm,
                  nn.GroupNorm)
_FRESH_FUNCTIONS = {"add", "sub", "mul", "truediv", "cat", "matmul", "conv1d", "conv2d", "conv3d",
                    "linear", "batch_norm", "layer_norm", "group_norm"}
ATOMIC_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"  # named, since torchvision is slow to import
_PASS_THROUGH = (nn.Dropout, nn.Dropout2d, nn.Identity)


class GraphReader:
    """Graphs of a model, traced once, module by module."""

    def __init__(self, model: nn.Module, graphs: bool, unread: Mapping[str, str]) -> None:
        self.model = model
        self.traced: dict[str, list[Traced]] = {}
        self.unread = dict(unread)
        for path, module in model.named_modules():
            if type(module) in MODULE_KINDS or not has_own_code(module) or path in unread:
                continue
            if not graphs and not is_torchs(module):
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
        """Return the modules whose own forward is called.

        The forward of a Sequential, say, does not run if its parent only iterates over it.
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
            if path in self.unread:  # it may call any of its descendants
                waiting += [name for name, _ in self.model.named_modules()
                            if name.startswith(path + ".") or not path]
        return found

    def _output_modules(self, path: str) -> Iterator[str]:
        """Yield the modules whose result is the output of the model, unchanged."""
        yield path
        for graph in self.graphs.get(path, ()):
            for node in graph.nodes:
                if node.op == "output" and isinstance(node.args[0], fx.Node) \
                        and node.args[0].op == "call_module":
                    yield from self._output_modules(join(path, str(node.args[0].target)))

    def statistics(self, path: str, node: fx.Node) -> tuple[str, ...]:
        """Return the BatchNorms whose outputs, added, are node's value; () if there are others."""
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
        """Return the channel dimension of node's value: the last after a Linear or LayerNorm."""
        if node.op == "call_module":
            child = self.model.get_submodule(join(path, str(node.target)))
            if isinstance(child, (nn.Linear, nn.LayerNorm)):
                return -1
        return 1

    def is_private(self, path: str, node: Any, reader: fx.Node) -> bool:
        """Return whether reader alone reads node's value, so that it may be overwritten."""
        if not isinstance(node, fx.Node) or set(node.users) != {reader}:
            return False
        if node.op == "call_module":
            child = self.model.get_submodule(join(path, str(node.target)))
            return isinstance(child, _FRESH_MODULES)
        return node.op == "call_function" and \
            getattr(node.target, "__name__", "") in _FRESH_FUNCTIONS


def has_own_code(module: nn.Module) -> bool:
    """Return whether module's forward may call activations, as in containers and user classes."""
    if isinstance(module, QuantActivation):
        return False
    forward = getattr(type(module), "forward", None)
    if forward is None or forward is nn.Module.forward or isinstance(module, ATOMIC_LAYERS):
        return False
    return not is_torchs(module) or type(module) is nn.PReLU or bool(list(module.children()))


def _is_batchnorm(module: nn.Module) -> bool:
    if f"{type(module).__module__}.{type(module).__name__}" == _FROZEN:
        return True
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and \
        type(module).forward is nn.modules.batchnorm._BatchNorm.forward


def is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
