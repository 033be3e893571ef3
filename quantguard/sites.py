"""Find every activation site of a model: pure, printable, nothing of the model changes.

A site is one call of an activation in somebody's ``forward``. Modules are traced one at a time
with torch.fx, their children as leaves: the user's model stays the container, and what torch.fx
cannot trace is only ever one module's own forward.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activation import QuantActivation
from .errors import ConversionError, SpecError
from .spec import FLOAT_BITS, QuantSpec

# kind -> (module class, functions, method names). A literal table: one row an activation.
_KINDS: dict[str, tuple[type[nn.Module], tuple[Callable[..., Any], ...], tuple[str, ...]]] = {
    "relu": (nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "relu6": (nn.ReLU6, (F.relu6,), ()),
    "leaky_relu": (nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), ()),
    "elu": (nn.ELU, (F.elu, F.elu_), ()),
    "selu": (nn.SELU, (F.selu, F.selu_, torch.selu, torch.selu_), ()),
    "celu": (nn.CELU, (F.celu, F.celu_, torch.celu, torch.celu_), ()),
    "gelu": (nn.GELU, (F.gelu,), ()),
    "silu": (nn.SiLU, (F.silu,), ()),
    "mish": (nn.Mish, (F.mish,), ()),
    "hardswish": (nn.Hardswish, (F.hardswish,), ()),
    "hardtanh": (nn.Hardtanh, (F.hardtanh, F.hardtanh_), ()),
    "softplus": (nn.Softplus, (F.softplus,), ()),
    "softsign": (nn.Softsign, (F.softsign,), ()),
    "tanh": (nn.Tanh, (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
    "sigmoid": (nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_), ("sigmoid", "sigmoid_")),
    "hardsigmoid": (nn.Hardsigmoid, (F.hardsigmoid,), ()),
}
KIND_OF_CLASS = {row[0]: kind for kind, row in _KINDS.items()}
KIND_OF_FUNCTION = {f: kind for kind, row in _KINDS.items() for f in row[1]}
KIND_OF_METHOD = {name: kind for kind, row in _KINDS.items() for name in row[2]}
GATES = ("sigmoid", "hardsigmoid")

# Calls whose result is a tensor of its own: writing into it is seen by nobody else.
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.LayerNorm,
                  nn.GroupNorm)
_FRESH_FUNCTIONS = {"add", "sub", "mul", "truediv", "cat", "matmul", "conv1d", "conv2d", "conv3d",
                    "linear", "batch_norm", "layer_norm", "group_norm"}
_PASS_THROUGH = (nn.Dropout, nn.Dropout2d, nn.Identity)


@dataclass(frozen=True)
class Site:
    """Describe one call of an activation.

    Attributes:
        name: where its staircase lives in the converted model.
        owner: full name of the module whose forward makes the call ("" is the model itself).
        kind: ``relu``, ``gelu``, ...
        form: ``module``, ``function``, ``method``; ``opaque`` where the caller's forward could not
            be traced and the activation module itself is replaced.
        target: the called module's name within owner (forms ``module`` and ``opaque``).
        call: number of this call among those of the same kind or module in owner's forward.
        call_name: the call's name within owner's forward.
        where: file and line of the call.
        function: the float activation as a module.
        inplace: whether somebody may read the overwritten input later.
        statistics: full names of the BatchNorms whose outputs, added, make up the input; empty
            where it comes from elsewhere.
        axis: channel dimension of the input.
        spec: the staircase it gets; None where it is kept.
        reason: why it is kept.
    """

    name: str
    owner: str
    kind: str
    form: str
    target: str
    call: int
    call_name: str
    where: str
    function: nn.Module = field(repr=False, compare=False)
    inplace: bool = False
    statistics: tuple[str, ...] = ()
    axis: int = 1
    spec: QuantSpec | None = None
    reason: str = ""

    @property
    def converted(self) -> bool:
        """Return whether the site gets a staircase."""
        return self.spec is not None


@dataclass(frozen=True)
class Plan:
    """List every activation site of a model, converted or kept and why; prints as a table."""

    sites: tuple[Site, ...]
    unread: tuple[str, ...] = ()
    """Modules whose forward torch.fx could not trace."""

    @property
    def converted(self) -> tuple[Site, ...]:
        """Return the sites that get a staircase."""
        return tuple(site for site in self.sites if site.converted)

    @property
    def kept(self) -> tuple[Site, ...]:
        """Return the sites that stay float."""
        return tuple(site for site in self.sites if not site.converted)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the sites as plain JSON types."""
        return [{"name": s.name, "kind": s.kind, "form": s.form, "call": s.call, "where": s.where,
                 "bits": s.spec.bits if s.spec else FLOAT_BITS,
                 "dynamic": bool(s.spec and s.spec.dynamic), "reason": s.reason}
                for s in self.sites]

    def __str__(self) -> str:
        rows = [("site", "kind", "call", "at", "becomes")]
        for s in self.sites:
            if s.spec is None:
                becomes = f"kept: {s.reason}"
            else:
                becomes = (f"{s.spec.bits}-bit {'dynamic' if s.spec.dynamic else 'fixed'}"
                           f"{' per channel' if s.spec.per_channel else ''}")
            rows.append((s.name, s.kind, str(s.call), s.where, becomes))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)), row[4]])
                 for row in rows]
        lines.append(f"{len(self.converted)} of {len(self.sites)} activation sites to convert")
        if self.unread:
            lines.append("forward not traceable, searched by module only: "
                         + ", ".join(self.unread))
        return "\n".join(lines)


class Tracer(fx.Tracer):
    """Trace one forward with every child a leaf, noting where calls stand in the source."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        now = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
               torch.is_autocast_enabled("cuda"))
        if getattr(self, "_modes", now) != now:
            raise fx.proxy.TraceError("a no_grad or autocast block, which a graph cannot hold")
        self._modes = now
        node = super().create_node(*args, **kwargs)
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and "/torch/" in frame.f_code.co_filename.replace("\\", "/") \
                and "/modules/" not in frame.f_code.co_filename.replace("\\", "/"):
            frame = frame.f_back
        if frame is not None and not frame.f_code.co_filename.endswith("sites.py"):
            node.meta["where"] = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        return node


def _short(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])


class Traced(NamedTuple):
    """Hold a forward's graph, and the tensors that it made up and wants as attributes."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


def trace(module: nn.Module, cls: type[nn.Module], training: bool) -> Traced:
    """Trace the forward of cls on module in the given mode, without touching module.

    Raises:
        Exception: whatever torch.fx or the forward raises on symbolic values.
    """
    # A shallow copy: attributes that tracing sets must not appear on the user's module.
    probe = object.__new__(cls)
    probe.__dict__.update(module.__dict__)
    probe.__dict__["training"] = training
    optional = {p.name: p.default for p in inspect.signature(cls.forward).parameters.values()
                if p.default is not p.empty}
    with torch.random.fork_rng(devices=[]):
        graph = Tracer().trace(probe, optional or None)
    # torch.fx renames arguments that it traced at their defaults; callers know the real names.
    names = [p for p in inspect.signature(cls.forward).parameters if p != "self"]
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=False):
        if not node.target.startswith("*"):
            node.target = name
    constants = {k: v for k, v in probe.__dict__.items() if k not in module.__dict__}
    return Traced(graph, constants)


def both_graphs(module: nn.Module, cls: type[nn.Module] | None = None) -> dict[bool, Traced]:
    """Trace train (True) and eval (False) mode; cls where module's class is not the user's."""
    return {mode: trace(module, cls or type(module), mode) for mode in (False, True)}


@dataclass(frozen=True)
class Call:
    """Hold one activation call found in a graph."""

    node: fx.Node
    kind: str
    form: str
    target: str
    number: int
    function: nn.Module
    name: str


def float_module(kind: str, node: fx.Node) -> nn.Module | None:
    """Return the activation of a function or method call as a module; None if args vary."""
    cls = _KINDS[kind][0]
    names = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    values = dict(zip(names, node.args[1:], strict=False)) | {
        k: v for k, v in node.kwargs.items() if k in names}
    if any(isinstance(v, fx.Node) for v in values.values()):
        return None
    return cls(**values)


def writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether an activation call overwrites its input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    position = {"relu": 1, "relu6": 1, "leaky_relu": 2, "elu": 2, "selu": 1, "celu": 2, "silu": 1,
                "mish": 1, "hardswish": 1, "hardtanh": 3, "hardsigmoid": 1}.get(name, 99)
    flag = node.args[position] if len(node.args) > position else node.kwargs.get("inplace", False)
    return name.endswith("_") or bool(flag)


def calls_in(module: nn.Module, graph: fx.Graph) -> list[Call]:
    """Return the activation calls of a graph in order, each with the name of its staircase.

    A module's first call keeps the module's own name; later calls and functions get a name of
    their own, which depends on their order only.
    """
    found: list[Call] = []
    counts: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        function: nn.Module | None
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            # A staircase stands for the activation that it follows: graphs can be had again later.
            function = child.function if isinstance(child, QuantActivation) else child
            kind, form, target = KIND_OF_CLASS.get(type(function)), "module", str(node.target)
        elif node.op == "call_function":
            kind, form, target = KIND_OF_FUNCTION.get(node.target), "function", ""
            function = float_module(kind, node) if kind else None
        elif node.op == "call_method":
            kind, form, target = KIND_OF_METHOD.get(str(node.target)), "method", ""
            function = float_module(kind, node) if kind else None
        else:
            continue
        if kind is None or function is None:
            continue
        key = ("module", target) if target else ("kind", kind)
        counts[key] = number = counts.get(key, 0) + 1
        name = target
        if not target or number > 1:
            stem = target.replace(".", "_") if target else kind
            name = f"{stem}_{number}" if number > 1 else stem
            while hasattr(module, name) and not isinstance(getattr(module, name), QuantActivation):
                name += "_q"
        found.append(Call(node, kind, form, target, number, function, name))
    return found


def _is_gate(node: fx.Node) -> bool:
    """Return whether what the node computes multiplies something."""
    for user in node.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if name in ("mul", "mul_", "imul"):
            return True
        if name in ("view", "reshape", "unsqueeze", "expand", "expand_as", "permute", "chunk",
                    "getitem", "split", "flatten", "view_as") and _is_gate(user):
            return True
    return False


class _Reader:
    """Read a model module by module; holds the graphs, which several questions share."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: dict[str, dict[bool, fx.Graph]] = {}
        self.unread: dict[str, str] = {}
        for path, module in model.named_modules():
            if type(module) in KIND_OF_CLASS or not _has_own_code(module):
                continue
            try:
                self.graphs[path] = {k: t.graph for k, t in both_graphs(module).items()}
            except Exception as error:
                self.unread[path] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.outputs = set(self._output_modules(""))

    def _output_modules(self, path: str) -> Iterator[str]:
        """Yield the modules whose result is, unchanged, the model's."""
        yield path
        for graph in self.graphs.get(path, {}).values():
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
            graph = self.graphs.get(target, {}).get(False)
            if graph is not None:
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


def join(path: str, name: str) -> str:
    """Return the full name of a child."""
    return f"{path}.{name}" if path else name


def _has_own_code(module: nn.Module) -> bool:
    """Return whether module's forward may call activations: containers and foreign classes."""
    if isinstance(module, QuantActivation):
        return False
    ours = type(module).__module__.startswith("torch.nn.")
    forward = getattr(type(module), "forward", None)
    if forward is None or forward is nn.Module.forward:
        return False
    return not ours or next(module.children(), None) is not None


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and \
        type(module).forward is nn.modules.batchnorm._BatchNorm.forward


def _merge(graphs: dict[bool, fx.Graph], module: nn.Module) -> list[Call]:
    """Return the calls of both modes, eval first: the same name is the same site."""
    merged: dict[str, Call] = {}
    for mode in (False, True):
        for call in calls_in(module, graphs[mode]):
            merged.setdefault(call.name, call)
    return list(merged.values())


def find_sites(model: nn.Module) -> Plan:
    """Find every site of model, none of them given a staircase yet."""
    reader = _Reader(model)
    sites: list[Site] = []
    seen: set[str] = set()
    for path, graphs in reader.graphs.items():
        for call in _merge(graphs, model.get_submodule(path)):
            node = call.node
            source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
            child = model.get_submodule(join(path, call.target)) if call.target else None
            inplace = writes_in_place(node, child) and not reader.is_private(path, source, node)
            name = join(path, call.name)
            if name in seen:  # somebody else's forward calls the very same child
                name += "_by_" + (path.replace(".", "_") or "model")
            seen.add(name)
            if call.target:
                seen.add(join(path, call.target))
            returned = any(user.op == "output" for user in node.users)
            reason = ""
            if path in reader.outputs and returned:
                reason = "model output"
            elif call.kind in GATES and _is_gate(node):
                reason = "gate"
            elif call.kind in GATES and returned:
                reason = "gate, perhaps: its caller gets it"
            sites.append(Site(
                name, path, call.kind, call.form, call.target, call.number,
                call.name, node.meta.get("where", ""), call.function, inplace,
                reader.statistics(path, source) if isinstance(source, fx.Node) else (),
                reader.axis(path, source) if isinstance(source, fx.Node) else 1, None, reason))
    for path, module in model.named_modules():
        kind = KIND_OF_CLASS.get(type(module))
        owner = path.rpartition(".")[0]
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            sites.append(Site(path, owner, "rnn", "module", path.rpartition(".")[2], 1, "", "",
                              nn.Identity(), reason="fused cell"))
        if kind is None or path in seen:
            continue
        opaque = any(not above or path.startswith(above + ".") for above in reader.unread)
        sites.append(Site(path, owner, kind, "opaque", path.rpartition(".")[2], 1, "", "",
                          module,
                          bool(getattr(module, "inplace", False)),
                          reason="" if opaque else "never called"))
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites.sort(key=lambda site: order[site.owner])
    return Plan(tuple(sites), tuple(reader.unread))


Bits = int | QuantSpec | Mapping[str, int | QuantSpec]


def assign(plan: Plan, model: nn.Module, bits: Bits, dynamic: bool, per_channel: bool,
           keep: Iterable[str | type[nn.Module]], gates: bool) -> Plan:
    """Give each site its spec, or the reason why it is kept.

    Raises:
        SpecError: a pattern of ``bits`` or ``keep`` that matches nothing.
    """
    keep = [keep] if isinstance(keep, (str, type)) else list(keep)
    used: set[Any] = set()
    table = dict(bits) if isinstance(bits, Mapping) else {"*": bits}
    decided = []
    for site in plan.sites:
        reason = site.reason
        if gates and reason.startswith("gate"):
            reason = ""
        for pattern in keep:
            if _matches(site, pattern, model):
                used.add(pattern)
                reason = reason or "keep="
        spec: QuantSpec | None = None
        for pattern, value in table.items():
            if _matches(site, pattern, model):
                used.add(pattern)
                spec = value if isinstance(value, QuantSpec) else \
                    QuantSpec(value, dynamic, per_channel)
        if spec is None:
            reason = reason or "no pattern of bits= names it"
        elif spec.is_float:
            reason = reason or "32 bits"
        decided.append(replace(site, spec=None if reason else spec, reason=reason))
    for pattern in [*keep, *table]:
        if pattern not in used and pattern != "*":
            names = [s.name for s in plan.sites] + sorted({s.kind for s in plan.sites})
            near = difflib.get_close_matches(str(pattern), names, 1, 0.3)
            raise SpecError(f"{pattern!r} matches no activation site",
                            fix=f"Did you mean {near[0]!r}?" if near else
                            "See quantguard.inspect(model) for the names.")
    return replace(plan, sites=tuple(decided))


def _matches(site: Site, pattern: str | type[nn.Module], model: nn.Module) -> bool:
    """Match a site by name, pattern, kind, or class: its own or that of a module around it."""
    if isinstance(pattern, type):
        above = site.owner.split(".") if site.owner else []
        around = [model.get_submodule(".".join(above[:i])) for i in range(1, len(above) + 1)]
        return isinstance(site.function, pattern) or any(isinstance(m, pattern) for m in around)
    return (fnmatch.fnmatchcase(site.name, pattern) or site.kind == pattern
            or site.name.startswith(pattern + "."))


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
                              fix="Use quantguard.restore(model) first to convert it differently.")
