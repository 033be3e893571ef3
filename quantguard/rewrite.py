"""Carry out a plan: convert, and restore.

The user's model stays the container. A module whose own forward calls an activation function, or
one activation module several times, gets a subclass of its own class whose ``forward`` is the one
that torch.fx generated; nothing else about it changes.
"""

from __future__ import annotations

import copy
import itertools
import linecache
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .activation import HOOKS, QuantActivation, staircases
from .audit import Audit, audit, find_example
from .batches import require_reiterable, unpack
from .calibrate import calibrate
from .errors import ConversionError, DataError
from .running import device_of, seeded, to_device
from .sites import (
    Bits,
    Plan,
    Site,
    assign,
    check_convertible,
    find_sites,
    join,
)
from .tracing import (
    Identity,
    Traced,
    Variant,
    calls_in,
    inputs_of,
    optional_arguments,
    planned_graphs,
    separate_aliases,
    trace,
    variant_of,
)

_numbers = itertools.count()


@dataclass(frozen=True)
class Conversion:
    """Hold how a model was converted; it travels with the converted model.

    Attributes:
        plan: every site, converted or kept.
        audit: what one input saw; None where none was run.
    """

    plan: Plan
    audit: Audit | None = None

    def summary(self) -> str:
        """Return one line: how many activations were converted, and what was not."""
        sites = self.plan.converted
        main = len(sites) if self.audit is None else len(self.audit.ran)
        auxiliary = len(sites) - main
        total = main + len(self.audit.left if self.audit else ())
        text = f"{main} of {total} activations converted"
        if auxiliary:
            text += f" (+{auxiliary} auxiliary, run in training only)"
        if self.plan.kept:
            text += f"; {len(self.plan.kept)} kept (" + ", ".join(sorted(
                {site.reason for site in self.plan.kept})) + ")"
        if self.audit is None:
            text += "; audit not run"
        return text


Names = tuple[tuple[Identity, str], ...]
"""(call in the user's forward, attribute that is called instead)."""


class _Rewritten:
    """Mix into the subclass of a rewritten module: how it is copied, pickled and undone."""

    _user_class: type[nn.Module]
    _names: Names

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The file names the user's class; its forward is traced again on loading: no code in it.
        return _revive, (self._user_class, self._names), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _rewrite(self, self._user_class, self._names)  # type: ignore[arg-type]


def _revive(cls: type[nn.Module], names: Names) -> nn.Module:
    body = {"_user_class": cls, "_names": names}
    module: nn.Module = object.__new__(type(cls.__name__, (_Rewritten, cls), body))
    return module


def _rewrite(module: nn.Module, cls: type[nn.Module], names: Names) -> None:
    """Give module the subclass of cls whose forward calls the named attributes instead.

    Raises:
        ConversionError: a call that is no longer in the forward of cls.
    """
    added = [attribute for _, attribute in names]
    traced = planned_graphs(module, cls, added)
    found = {call.identity for one in traced.values() for call in calls_in(module, one.graph)}
    gone = [identity for identity, _ in names if identity not in found]
    if gone:
        raise ConversionError(
            f"{cls.__qualname__} no longer calls {gone[0][0]} at {gone[0][1]}",
            why="Its source has changed since the model was converted.",
            fix="Convert the float model again, then load the converted one's state_dict.")
    forwards: dict[Variant, Any] = {}
    sources: set[str] = set()
    for variant, one in traced.items():
        _redirect(module, one, dict(names))
        sources.add(one.graph.python_code("self").src)
        forwards[variant] = _compile(one, cls)
    if optional_arguments(cls):
        forward = _by_arguments(cls, names, forwards)
    elif len(sources) == 1:
        forward = next(iter(forwards.values()))
    else:
        forward = _by_mode({variant.training: one for variant, one in forwards.items()})
    body = {"_user_class": cls, "_names": names, "forward": forward,
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    module.__class__ = type(cls.__name__, (_Rewritten, cls), body)


def _by_mode(modes: dict[bool, Any]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return modes[self.training](self, *args, **kwargs)
    return forward


def _by_arguments(cls: type[nn.Module], names: Names, forwards: dict[Variant, Any]) -> Any:
    """Return a forward that takes, or traces, the graph for the arguments it is called with."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        variant = variant_of(cls, self.training, args, kwargs)
        if variant not in forwards:
            try:
                one = trace(self, cls, variant, [attribute for _, attribute in names])
            except Exception as error:
                raise ConversionError(
                    f"the forward of {cls.__qualname__} cannot be traced for these arguments",
                    why=f"{dict(variant.static)}: {error}",
                    fix="Name the module with keep= when converting.") from error
            _redirect(self, one, dict(names))
            forwards[variant] = _compile(one, cls)
        positional, named = inputs_of(cls, variant, args, kwargs)
        return forwards[variant](self, *positional, **named)
    return forward


def _compile(traced: Traced, cls: type[nn.Module]) -> Any:
    code = traced.graph.python_code("self")
    file = f"<quantguard {cls.__qualname__} {next(_numbers)}>"
    # Known to linecache, the generated lines show in a traceback and to torch.compile.
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    space = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    return space["forward"]


def _redirect(module: nn.Module, traced: Traced, names: dict[Identity, str]) -> None:
    """Make a graph call the named attributes, and give module the tensors that it made up."""
    graph = traced.graph
    module.__dict__.update(traced.constants)
    for call in calls_in(module, graph):
        attribute = names.get(call.identity)
        if attribute is None:
            continue
        node = call.node
        if call.target:
            node.target = attribute
            continue
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        with graph.inserting_before(node):
            new = graph.call_module(attribute, (source,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.lint()


def convert(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            keep: Iterable[str | type[nn.Module]] = (), gates: bool = False) -> nn.Module:
    """Return a copy of model whose activations are low-bit staircases.

    Args:
        model: any classifier; it is not touched.
        bits: 1 to 8 (32 stays float), a QuantSpec, or {pattern: bits or QuantSpec}; patterns
            match site names as in a shell, or kinds; the last that matches counts.
        dynamic: thresholds and step are learned (DQA) instead of fixed (FQA).
        data: a re-iterable of model inputs or (inputs, labels); thresholds start where the mean
            squared error on the first batches is smallest. None: BatchNorm statistics, else a
            seeded probe.
        example: one input batch, for the audit and the probe; None: the first batch of data, else
            a shape that the model accepts.
        per_channel: thresholds per channel.
        keep: names, patterns, kinds or classes of what stays float.
        gates: convert sigmoids that multiply something, too.

    Returns:
        The converted model, an instance of model's class, in model's modes, with a
        :class:`Conversion` in its attribute ``quantguard``.

    Raises:
        ConversionError: nothing to convert, converted already, a ScriptModule, or a forward that
            the rewritten model does not reproduce bit for bit under ``bypass``.
        SpecError: a pattern that matches nothing, or impossible bits.

    Example:
        >>> net = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), bits=2)
        >>> net[1].thresholds.shape
        torch.Size([3])
    """
    original = unwrap(model)
    plan = make_plan(original, bits, dynamic, per_channel=per_channel, keep=keep, gates=gates)
    batches: list[Any] | None = None
    if data is not None:
        require_reiterable(data, "data")
        device = device_of(original)
        with seeded(0):  # a shuffling loader draws from the caller's random numbers
            batches = [to_device(unpack(batch)[0], device) for batch in itertools.islice(data, 16)]
        for number, batch in enumerate(batches):
            for x in batch.values() if isinstance(batch, dict) else (batch,):
                if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
                    raise DataError(f"batch {number} of data holds NaN or infinite values")
        if not batches:
            raise DataError("data is empty", fix="Pass at least one batch of model inputs.")
    converted = carry_out(original, plan)
    # A forward may count or remember: what is run to look at it is never the model itself.
    if example is None:
        example = batches[0] if batches else find_example(copy.deepcopy(original))
    calibrate(converted, plan.converted, batches,
              example if isinstance(example, Tensor) else None)
    found = None if example is None else audit(copy.deepcopy(original), copy.deepcopy(converted),
                                               plan, example)
    if found is not None and not found.identical:
        raise ConversionError(
            "the converted model does not reproduce the float one under bypass",
            why="Its forward does something that torch.fx cannot see, or is not deterministic.",
            fix="Name the modules that it happens in with keep=, and please report the model.")
    converted.__dict__["quantguard"] = Conversion(plan, found)
    return converted


def make_plan(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
              per_channel: bool = False, keep: Iterable[str | type[nn.Module]] = (),
              gates: bool = False) -> Plan:
    """Return the plan that :func:`convert` carries out.

    Raises:
        ConversionError: nothing to convert, converted already, or a ScriptModule.
        SpecError: a pattern that matches nothing, or impossible bits.
    """
    check_convertible(model)
    plan = assign(find_sites(model), model, bits, dynamic, per_channel, keep, gates)
    if not plan.converted:
        why = "None of its modules calls an activation that quantguard knows."
        if plan.sites:
            why = "Every one is kept: " + "; ".join(
                f"{s.name or 'the model itself'} ({s.reason})" for s in plan.sites[:5])
        raise ConversionError(f"{type(model).__name__} has no activations to convert", why=why)
    return plan


def inspect(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            keep: Iterable[str | type[nn.Module]] = (), gates: bool = False) -> Plan:
    """Return every activation site of model, converted or kept and why; nothing is changed.

    Takes the options of :func:`convert`. Of a converted model, returns the plan it was made by.

    Raises:
        ConversionError, SpecError: as :func:`convert`.
    """
    del data, example  # they place thresholds, and a plan has none
    done = conversion_of(model)
    if done is not None:
        return done.plan
    return make_plan(unwrap(model), bits, dynamic, per_channel=per_channel, keep=keep, gates=gates)


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return how model was converted, or None for a float one."""
    done = getattr(unwrap(model), "__dict__", {}).get("quantguard")
    return done if isinstance(done, Conversion) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DataParallel or torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of model with the plan's staircases in place, thresholds not yet calibrated."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(f"{type(model).__name__} cannot be copied",
                              why=f"copy.deepcopy: {error}") from error
    device = device_of(twin)
    by_owner: dict[str, list[Site]] = {}
    for site in plan.sites:
        by_owner.setdefault(site.owner, []).append(site)
    for path, sites in by_owner.items():
        owner = twin.get_submodule(path)
        separate_aliases(owner._modules)
        names: dict[Identity, str] = {}
        replacements: dict[str, nn.Module] = {}
        targets: dict[str, str] = {}
        taken = {s.target for s in sites if s.converted and s.name == join(path, s.target)}
        for site in sites:
            attribute = site.name[len(path) + 1 :] if path else site.name
            if site.converted:
                assert site.spec is not None
                staircase = QuantActivation(site.spec, site.function, axis=site.axis,
                                            inplace=site.inplace).to(device)
                replacements[attribute] = staircase
            elif site.target in taken and site.call > 1:
                # a later call of a module whose first call is converted stays float
                replacements[attribute] = copy.deepcopy(site.function)
            else:
                continue
            if site.target:
                targets[attribute] = site.target
            if site.form != "opaque" and attribute != site.target:
                names[site.identity] = attribute
        called = {attribute: owner.get_submodule(target) for attribute, target in targets.items()}
        for attribute, module in replacements.items():
            _put(owner, attribute, module, called.get(attribute))
        if names:
            _rewrite(owner, type(owner), tuple(names.items()))
    return twin


def _put(owner: nn.Module, attribute: str, module: nn.Module, old: nn.Module | None) -> None:
    """Set a child, in the mode and with the hooks of the one whose calls it takes over."""
    parent_path, _, name = attribute.rpartition(".")
    module.training = owner.training if old is None else old.training
    if old is not None:
        for hooks in HOOKS:
            getattr(module, hooks).update(getattr(old, hooks))
        module._is_full_backward_hook = old._is_full_backward_hook
    children = owner.get_submodule(parent_path)._modules
    replaced = children.get(name)
    children[name] = module
    for other, child in children.items():
        if replaced is not None and child is replaced:
            children[other] = module  # an alias stays one


def restore(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model with float activations and its present weights.

    Raises:
        ConversionError: model holds no staircase.
    """
    model = unwrap(model)
    if not staircases(model):
        raise ConversionError(f"{type(model).__name__} is not converted: it holds no staircase")
    twin = copy.deepcopy(model)
    twin.__dict__.pop("quantguard", None)
    added = set()
    for path, module in list(twin.named_modules()):
        if isinstance(module, _Rewritten):
            added |= {join(path, attribute) for _, attribute in module._names}
            object.__setattr__(module, "__class__", module._user_class)
    for path, module in staircases(twin).items():
        parent_path, _, name = path.rpartition(".")
        parent = twin.get_submodule(parent_path)
        if path in added:
            del parent._modules[name]
            continue
        function = copy.deepcopy(module.function)
        if hasattr(function, "inplace"):
            setattr(function, "inplace", module.float_inplace)  # noqa: B010 - typed as a Module
        _put(parent, name, function, module)
    for path in added - set(staircases(model)):  # float copies of calls that were kept
        parent_path, _, name = path.rpartition(".")
        del twin.get_submodule(parent_path)._modules[name]
    return twin
