"""Carry out a plan: convert, inspect, restore."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from .activation import HOOKS, QuantActivation, staircases
from .audit import Audit, audit
from .batches import require_reiterable, unpack
from .calibrate import calibrate
from .calls import Identity
from .entrance import is_input
from .errors import ConversionError, DataError, QuantguardError, SpecError
from .example import find_example
from .held import reordered
from .interception import Hook
from .kinds import function_of
from .metadata import ModelMetadata, annotate, known_of
from .plan import Bits, Plan, Site, assign, join
from .rewrite import Rewritten, add_entrance, fused_paths, rewrite, undo
from .running import (
    as_eaten,
    as_given,
    check_numbers,
    device_of,
    duplicate,
    entry_point,
    ordinary,
    run,
    seeded,
    stand_in,
    tensors_in,
    unwrap,
)
from .sites import check_convertible, find_sites
from .spec import FLOAT_BITS, InputSpec, Threat, check_threat, plain
from .tracing import separate_aliases

_CALIBRATED = 16  # batches
_NO_INPUT = "no input was found that the model accepts"
_GIVE_ONE = "Give one: example=torch.randn(1, 3, 224, 224), or data= (--input-shape 3,224,224)."


@dataclass(frozen=True)
class Conversion(ModelMetadata):
    """Hold how a model was converted; it travels with the converted model.

    Attributes:
        plan: every site, converted or kept.
        audit: what one input saw; None where none was run.
        threat, num_classes, class_names, input_shape: as :class:`ModelMetadata`.
    """

    plan: Plan
    audit: Audit | None = None

    def __str__(self) -> str:
        return self.plan.told(self.summary())

    def summary(self) -> str:
        """Return one line: how many activations were converted, and what was not."""
        sites = self.plan.converted
        main = len(sites) if self.audit is None else len(self.audit.ran)
        auxiliary = len(sites) - main
        total = main + len(self.audit.left if self.audit else ())
        text = f"{main} of {total} activations converted"
        if auxiliary:
            text += f" (+{auxiliary} that the audit's input did not reach)"
        if self.plan.kept:
            text += f"; kept: {self.plan.kept_by_reason()}"
        if self.audit is None:
            text += f"; audit not run: {_NO_INPUT}"
        return text


@entry_point
def convert(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            keep: Iterable[str | type[nn.Module]] = (), gates: bool = False,
            input_bits: int | None = None, input_range: Any = None,
            threat: Threat | None = None) -> nn.Module:
    """Return a copy of model whose activations are low-bit staircases.

    Args:
        model: any classifier; it is not touched.
        bits: 1 to 8 (32 stays float), a QuantSpec, or {pattern: bits or QuantSpec}; patterns
            match site names as in a shell, or kinds; the last that matches counts.
        dynamic: thresholds and step are learned (DQA) instead of fixed (FQA).
        data: a re-iterable of model inputs or (inputs, labels); thresholds start where the mean
            squared error on 16 batches is smallest: the first, or, of a DataLoader that does not
            shuffle and of a list, such as stand for all of it. None: BatchNorm statistics, else a
            seeded probe.
        example: one input batch, for the audit and the probe; None: the first batch of data, else
            a shape that the model accepts.
        per_channel: thresholds per channel.
        keep: names, patterns, kinds or classes of what stays float.
        gates: convert sigmoids that multiply something, too.
        input_bits: bits of a staircase on the input, too; None: none.
        input_range: its lowest and highest level, in what the model eats: a pair, or a pair for
            each channel.
        threat: what is to travel with the model as ``model.quantguard.threat``, where its mean,
            std or bounds are known; None: what travels with it already.

    Returns:
        The converted model, an instance of model's class, in model's modes, with a
        :class:`Conversion` in its attribute ``quantguard``.

    Raises:
        ConversionError: nothing to convert, converted already, a ScriptModule, on the meta device,
            not to be copied, or a forward that the rewritten model does not reproduce bit for bit
            under ``bypass``.
        SpecError: a pattern that matches nothing, or impossible bits.

    Example:
        >>> net = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), bits=2)
        >>> net[1].thresholds.shape
        torch.Size([3])
    """
    original = unwrap(model)
    check_convertible(original)
    if threat is not None:
        check_threat(threat)
    check_numbers(original)
    original, example = ordinary(original), as_given(example, "the example is")
    entry = input_spec(input_bits, input_range)
    batches: list[Any] | None = None
    if data is not None:
        require_reiterable(data, "data")
        with seeded(0):  # a shuffling loader draws from the caller's random numbers
            batches = [as_eaten(unpack(batch)[0], original)
                       for batch in itertools.islice(_spread(data), _CALIBRATED)]
        for number, batch in enumerate(batches):
            for x in tensors_in(batch):
                if x.is_floating_point() and not x.isfinite().all():
                    raise DataError(f"batch {number} of data holds NaN or infinite values")
        if not batches:
            raise DataError("data is empty", fix="Pass at least one batch of model inputs.")
    if example is None and batches:
        example = batches[0]
    converted, plan, found = _converted(original, batches, example, bits, dynamic, per_channel,
                                        keep, gates, entry)
    known = known_of(original)
    converted.__dict__["quantguard"] = Conversion(plan, found, **(
        known if threat is None else {**known, "threat": threat}))
    if found is None and plan.unread:
        warnings.warn(f"{_NO_INPUT}: activations in {_unread(plan)} stay float. {_GIVE_ONE}",
                      stacklevel=2)
    return converted


def _spread(data: Iterable[Any]) -> Iterable[Any]:
    """Return data whose first batches stand for all of it: sorted by class they would not.

    Where data has more batches than calibration reads, a DataLoader that reads in order gives its
    images in a seeded order instead, and of a list of batches some from all over it are taken.
    """
    if isinstance(data, DataLoader):
        if type(data.sampler) is SequentialSampler and len(data) > _CALIBRATED:
            return reordered(data, 0)
    elif isinstance(data, (list, tuple)) and len(data) > _CALIBRATED:
        return [data[i * len(data) // _CALIBRATED] for i in range(_CALIBRATED)]
    return data


def _converted(model: nn.Module, batches: list[Any] | None, example: Any, bits: Bits,
               dynamic: bool, per_channel: bool, keep: Iterable[str | type[nn.Module]],
               gates: bool, entry: InputSpec | None) -> tuple[nn.Module, Plan, Audit | None]:
    """Convert by graphs; where the audit shows that they are not what the model computes, by runs.

    Raises:
        ConversionError: neither reproduces the float model.
    """
    best: tuple[nn.Module, Plan, Audit] | None = None
    for graphs in (True, False):
        try:
            plan = make_plan(model, bits, dynamic, example=example, per_channel=per_channel,
                             keep=keep, gates=gates, graphs=graphs, entry=entry)
        except QuantguardError as error:
            if best is not None:
                return best  # what was asked for has no name without graphs
            if not graphs or not isinstance(error, ConversionError):
                raise
            example = find_example(model) if example is None else example
            if example is None:
                raise
            continue
        if example is None:
            example = plan.example if plan.example is not None else find_example(model)
        plan = replace(plan, example=None)  # it does not travel with the model
        converted = carry_out(model, plan)
        # A forward may count or remember: what is run to look at it is never the model itself.
        tried = stand_in(converted)
        calibrate(tried, plan.converted, batches, example)
        placed = staircases(tried)
        for name, staircase in staircases(converted).items():
            staircase.load_state_dict(placed[name].state_dict())
        if example is None:
            return converted, plan, None
        found = audit(stand_in(model), stand_in(converted), plan, example)
        if found.identical and not found.left:
            return converted, plan, found
        if found.identical and (best is None or len(found.left) < len(best[2].left)):
            best = converted, plan, found
    if best is not None:
        return best
    raise ConversionError(
        "the converted model does not reproduce the float one under bypass",
        why="Its forward does something that torch.fx cannot see, or is not deterministic.",
        fix="Name the modules that it happens in with keep=, and please report the model.")


def make_plan(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *, example: Any = None,
              per_channel: bool = False, keep: Iterable[str | type[nn.Module]] = (),
              gates: bool = False, graphs: bool = True,
              entry: InputSpec | None = None) -> Plan:
    """Return the plan that :func:`convert` carries out.

    Raises:
        ConversionError: nothing to convert, converted already, or a ScriptModule.
        SpecError: a pattern that matches nothing, or impossible bits.
    """
    check_convertible(model)
    found = find_sites(model, example, graphs=graphs)
    plan = replace(assign(found, model, bits, dynamic, per_channel, keep, gates), input=entry)
    if not plan.converted and entry is None:
        if plan.unread and example is None and plan.example is None:
            raise ConversionError(
                f"{_NO_INPUT}, a {type(model).__name__}, and its activations are found by running",
                why=f"torch.fx cannot trace {_unread(plan)}.", fix=_GIVE_ONE)
        if plan.unread and example is not None:
            _check_example(model, example)
        why = "None of its modules calls an activation that quantguard knows."
        if plan.sites:
            why = "Every one is kept: " + "; ".join(
                f"{s.name or 'the model itself'} ({s.reason})" for s in plan.sites[:5])
        raise ConversionError(f"{type(model).__name__} has no activations to convert", why=why)
    return plan


@entry_point
def inspect(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            keep: Iterable[str | type[nn.Module]] = (), gates: bool = False,
            input_bits: int | None = None, input_range: Any = None) -> Plan:
    """Return every activation site of model, converted or kept and why; nothing is changed.

    Takes the options of :func:`convert`. Of a converted model, returns the plan it was made by.

    Raises:
        ConversionError, SpecError: as :func:`convert`.
        DataError: an example that the model does not accept.
    """
    done = conversion_of(model)
    if done is not None:
        return done.plan
    if example is not None:
        if device_of(unwrap(model)).type != "meta":
            example = as_given(example, "the example is")
        _check_example(unwrap(model), example)
    elif data is not None:
        example = next((unpack(batch)[0] for batch in data), None)
    return make_plan(unwrap(model), bits, dynamic, example=example, per_channel=per_channel,
                     keep=keep, gates=gates, entry=input_spec(input_bits, input_range))


def _check_example(model: nn.Module, example: Any) -> None:
    """Raise a DataError where a model does not accept an example."""
    with torch.no_grad(), seeded(0):  # a copy: a forward may leave traces
        run(duplicate(model).eval(), as_eaten(example, model), "the example")


def _unread(plan: Plan) -> str:
    """Return in words which forwards torch.fx cannot trace, and why."""
    return "; ".join(f"{name or 'the model itself'} ({why})"
                     for name, why in list(plan.unread.items())[:3])


def input_spec(bits: int | None, ends: Any) -> InputSpec | None:
    """Return the staircase on the input that ``input_bits`` and ``input_range`` ask for.

    Raises:
        SpecError: one without the other, or no range.
    """
    if (bits is None) != (ends is None):
        raise SpecError("input_bits and input_range (--input-bits, --input-range) go together",
                        fix="input_range is (lowest, highest) of what the model eats.")
    if bits is None:
        return None
    try:
        pairs = [ends] if isinstance(plain(ends[0]), (int, float)) else list(ends)
        low, high = zip(*((a, b) for a, b in pairs), strict=True)
    except (TypeError, ValueError, IndexError, KeyError):
        raise SpecError(f"input_range={ends!r} is no pair",
                        fix="Give (low, high), or one such pair per channel.") from None
    return InputSpec(bits, low, high)


def with_entrance(model: nn.Module, spec: InputSpec) -> nn.Module:
    """Return a copy of model, converted or not, with a staircase on its input.

    Raises:
        ConversionError: it has one already.
    """
    model = unwrap(model)
    if any(map(is_input, staircases(model))):
        raise ConversionError("the model has a staircase on its input already")
    done = conversion_of(model)
    if done is None:
        done = Conversion(make_plan(model, FLOAT_BITS, entry=spec), **known_of(model))
    twin = duplicate(model)
    add_entrance(twin, spec)
    twin.__dict__["quantguard"] = replace(done, plan=replace(done.plan, input=spec, example=None))
    return twin


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return how model was converted, or None for a float one."""
    done = getattr(unwrap(model), "__dict__", {}).get("quantguard")
    return done if isinstance(done, Conversion) else None


def carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of model with the plan's staircases in place, thresholds not yet calibrated."""
    twin = duplicate(model)
    device = device_of(twin)
    by_owner: dict[str, list[Site]] = {}
    for site in plan.sites:
        by_owner.setdefault(site.owner, []).append(site)
    for path, sites in by_owner.items():
        _furnish(twin.get_submodule(path), path, sites, device)
    for module in list(twin.modules()):
        if fused_paths(module) and staircases(module) and not isinstance(module, Rewritten):
            rewrite(module, type(module), ())
    if plan.input is not None:
        add_entrance(twin, plan.input)
    return twin


def _furnish(owner: nn.Module, path: str, sites: list[Site], device: torch.device) -> None:
    """Give one module its staircases, and the forward that calls them."""
    separate_aliases(owner._modules)
    names: dict[Identity, str] = {}
    hooks: list[Hook] = []
    replacements: dict[str, nn.Module] = {}
    targets: dict[str, str] = {}
    taken = {s.target for s in sites if s.converted and s.name == join(path, s.target)}
    for site in sites:
        attribute = site.name[len(path) + 1 :] if path else site.name
        if site.converted:
            assert site.spec is not None
            replacements[attribute] = QuantActivation(
                site.spec, site.function, axis=site.axis, inplace=site.inplace).to(device)
        elif site.target in taken and site.call > 1:
            # a later call of a module whose first call is converted stays float
            replacements[attribute] = copy.deepcopy(site.function)
        elif site.intercepted:
            attribute = ""
        else:
            continue
        if site.target and attribute:
            targets[attribute] = site.target
        if site.intercepted:
            hooks.append(Hook(site.identity, attribute, site.form, site.argument))
            hooks += [Hook(part, "") for part in site.parts]
        elif site.form not in ("opaque", "attribute") and attribute != site.target:
            names[site.identity] = attribute
    called = {attribute: owner._modules.get(target) if "." not in target else
              owner.get_submodule(target) for attribute, target in targets.items()}
    for attribute, module in replacements.items():
        owner.__dict__.pop(attribute, None)  # a function kept in an attribute
        _put(owner, attribute, module, called.get(attribute))
    if names:
        rewrite(owner, type(owner), tuple(names.items()))
    elif any(hook.attribute for hook in hooks):
        rewrite(owner, type(owner), (), tuple(hooks))


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


@entry_point
def restore(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model with float activations and its present weights.

    Raises:
        ConversionError: model holds no staircase.
    """
    model = unwrap(model)
    if not staircases(model):
        raise ConversionError(f"{type(model).__name__} is not converted: it holds no staircase")
    twin = duplicate(model)
    done = twin.__dict__.pop("quantguard", None)
    known = known_of(model)
    if any(value is not None for value in known.values()):
        annotate(twin, **known)
    added = undo(twin)  # the input's staircase is gone
    functions = {site.name: site for site in done.plan.converted if site.form == "attribute"} \
        if done is not None else {}
    for path, module in staircases(twin).items():
        parent_path, _, name = path.rpartition(".")
        parent = twin.get_submodule(parent_path)
        if path in added:
            del parent._modules[name]
            continue
        if path in functions:
            del parent._modules[name]
            setattr(parent, name, function_of(functions[path].kind))
            continue
        function = copy.deepcopy(module.function)
        if hasattr(function, "inplace"):
            setattr(function, "inplace", module.float_inplace)  # noqa: B010 - typed as a Module
        _put(parent, name, function, module)
    for path in added - set(staircases(model)):  # float copies of calls that were kept
        parent_path, _, name = path.rpartition(".")
        del twin.get_submodule(parent_path)._modules[name]
    return twin
