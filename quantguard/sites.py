"""Find every activation site of a model: pure, printable, nothing of the model changes.

A site is one call of an activation in somebody's ``forward``. Modules are traced one at a time
with torch.fx, their children as leaves: the user's model stays the container, and what torch.fx
cannot trace is only ever one module's own forward.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from .activation import QuantActivation
from .errors import ConversionError, SpecError
from .spec import FLOAT_BITS, QuantSpec
from .tracing import (
    GATES,
    KIND_OF_CLASS,
    Identity,
    is_gate,
    named_calls,
    planned_graphs,
    writes_in_place,
)

# Calls whose result is a tensor of its own: writing into it is seen by nobody else.
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.LayerNorm,
                  nn.GroupNorm)
_FRESH_FUNCTIONS = {"add", "sub", "mul", "truediv", "cat", "matmul", "conv1d", "conv2d", "conv3d",
                    "linear", "batch_norm", "layer_norm", "group_norm"}
_NO_CALL: Identity = ("", "", 0)
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
        identity: what makes it the same call in every graph of owner's forward.
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
    identity: Identity
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


class _Reader:
    """Read a model module by module; holds the graphs, which several questions share."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: dict[str, list[fx.Graph]] = {}
        self.unread: dict[str, str] = {}
        for path, module in model.named_modules():
            if type(module) in KIND_OF_CLASS or not _has_own_code(module):
                continue
            try:
                self.graphs[path] = [t.graph for t in planned_graphs(module).values()]
            except Exception as error:
                self.unread[path] = f"{type(error).__name__}: {error}".splitlines()[0]
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


def find_sites(model: nn.Module) -> Plan:
    """Find every site of model, none of them given a staircase yet."""
    reader = _Reader(model)
    sites: list[Site] = []
    seen: set[str] = set()
    for path, graphs in reader.graphs.items():
        if path not in reader.called:
            continue
        for call, own_name, number in named_calls(model.get_submodule(path), graphs):
            node = call.node
            source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
            child = model.get_submodule(join(path, call.target)) if call.target else None
            inplace = writes_in_place(node, child) and not reader.is_private(path, source, node)
            name = join(path, own_name)
            if name in seen:  # somebody else's forward calls the very same child
                name += "_by_" + (path.replace(".", "_") or "model")
            seen.add(name)
            if call.target:
                seen.add(join(path, call.target))
            returned = any(user.op == "output" for user in node.users)
            reason = ""
            if path in reader.outputs and returned:
                reason = "model output"
            elif call.kind in GATES and is_gate(node):
                reason = "gate"
            elif call.kind in GATES and returned:
                reason = "gate, perhaps: its caller gets it"
            sites.append(Site(
                name, path, call.kind, call.form, call.target, number,
                call.identity, node.meta.get("where", ""), call.function, inplace,
                reader.statistics(path, source) if isinstance(source, fx.Node) else (),
                reader.axis(path, source) if isinstance(source, fx.Node) else 1, None, reason))
    for path, module in model.named_modules():
        kind = KIND_OF_CLASS.get(type(module))
        owner = path.rpartition(".")[0]
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            sites.append(Site(path, owner, "rnn", "module", path.rpartition(".")[2], 1,
                              _NO_CALL, "", nn.Identity(), reason="fused cell"))
        if kind is None or path in seen:
            continue
        opaque = any(not above or path.startswith(above + ".") for above in reader.unread)
        sites.append(Site(path, owner, kind, "opaque", path.rpartition(".")[2], 1, _NO_CALL,
                          "", module,
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
