"""Find every activation site of a model, without changing the model.

A site is one call of an activation in a ``forward``. Modules are traced one at a time with
torch.fx, with their children as leaves, so that a forward that torch.fx cannot trace affects only
one module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import ConversionError
from ..nn.activation_kinds import (
    ALWAYS_EXCLUDED,
    GATES,
    MODULE_KINDS,
    always_excluded,
    kind_of,
    module_of,
    overwrites,
)
from ..nn.quant_activation import QuantActivation
from .activation_calls import Identity, is_gate, named_calls, own_name
from .fx_tracer import Traced
from .graph_reader import ATOMIC_LAYERS, GraphReader, is_torchs
from .plan import Plan, Site, join
from .runtime_discovery import discover
from .runtime_recorder import Intercepted

# Layers of torch that cannot be traced and have fused paths; their activation calls are known.
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_NO_CALL: Identity = ("", "", 0)


def find_sites(model: nn.Module, example: Any = None,
               known: Mapping[str, list[Intercepted]] | None = None,
               unread: Mapping[str, str] | None = None, graphs: bool = True) -> Plan:
    """Return a plan with every site of model and no quantizers yet.

    Args:
        example: an input for forwards that cannot be traced; None: an input that the model accepts
            is searched for.
        known: calls in such forwards by module, if they were recorded before.
        unread: the forwards that could not be traced then, and why.
        graphs: whether to trust graphs; False: every forward that is not torch's own is run.
    """
    reader = GraphReader(model, graphs, unread or {})
    sites: list[Site] = []
    seen: set[str] = set()
    for path, traced in reader.traced.items():
        if path in reader.called:
            sites += _traced_sites(reader, path, traced, seen)
    untraceable = {path: why for path, why in reader.unread.items()
                   if not is_torchs(model.get_submodule(path))}
    run_time = [path for path in untraceable if not _is_layer(model.get_submodule(path))]
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
    return Plan(tuple(sites), untraceable, example)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and type(module).forward in [c.forward for c in _LAYERS]


def _layer_sites(layer: nn.Module, path: str) -> Iterator[Site]:
    """Yield the activation that a transformer layer stores as a function in an attribute."""
    kind = kind_of(layer.__dict__.get("activation"))
    module = module_of(kind, (None,), {}, ()) if kind is not None else None
    if kind is not None and module is not None:
        yield Site(join(path, "activation"), path, kind, "attribute", "activation", 1, _NO_CALL,
                   "", module, axis=-1)


def _traced_sites(reader: GraphReader, path: str, traced: list[Traced],
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
    """Return why a call is excluded, or an empty text."""
    if returned and is_output:
        return "model output"
    if always_excluded(kind, where):
        return always_excluded(kind, where)
    if kind in GATES and gate:
        return "gate"
    return "gate (assumed): returned to the caller" if kind in GATES and returned else ""


def _free_name(path: str, name: str, target: str, seen: set[str]) -> str:
    """Return a full name for a quantizer, and mark it as taken."""
    full = join(path, name)
    if full in seen:  # another forward calls the same child
        # The quantizer goes into this module, since other code may iterate over that child's
        # siblings.
        full = join(path, f"{name.replace('.', '_')}_by_{path.replace('.', '_') or 'model'}")
    seen.add(full)
    if target:
        seen.add(join(path, target))
    return full


def _intercepted_sites(model: nn.Module, path: str, found: list[Intercepted],
                       seen: set[str]) -> Iterator[Site]:
    """Yield the sites of a forward whose calls were recorded at run time."""
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


def _module_sites(model: nn.Module, reader: GraphReader, seen: set[str]) -> Iterator[Site]:
    """Yield modules whose calls were not seen, and torch's layers that are never converted."""
    for path, module in model.named_modules():
        kind = MODULE_KINDS.get(type(module))
        owner, _, name = path.rpartition(".")
        if isinstance(module, ATOMIC_LAYERS):
            attention = isinstance(module, nn.MultiheadAttention)
            yield Site(path, owner, "attention" if attention else "rnn", "module", name, 1,
                       _NO_CALL, "", nn.Identity(),
                       reason="attention softmax" if attention else "fused cell")
        if kind is None or path in seen:
            continue
        # A forward that was run without calling the module may call it for other inputs.
        opaque = any(not above or path.startswith(above + ".") for above in reader.unread)
        yield Site(path, owner, kind, "opaque", name, 1, _NO_CALL, "", module,
                   bool(getattr(module, "inplace", False)),
                   reason=ALWAYS_EXCLUDED.get(kind, "") if opaque else "never called")


def check_convertible(model: Any) -> None:
    """Raise an error unless model is a float nn.Module.

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
