"""Convert a model, show what would be converted, and restore the float model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..core.errors import ConversionError, QuantguardError
from ..core.metadata import ModelMetadata, annotate, known_of
from ..core.module_utils import check_numbers, duplicate, ordinary, stand_in, unwrap
from ..core.nested_tensors import as_given, device_of
from ..core.runtime import entry_point
from ..core.specs import FLOAT_BITS, InputSpec, Threat, check_threat
from ..data.batches import unpack
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .apply_plan import apply_plan, remove_plan
from .audit import Audit, audit
from .calibration import calibrate
from .calibration_batches import calibration_batches
from .example_input import find_example
from .module_rewrite import add_input_quantizer
from .plan import Bits, Plan
from .planning import (
    GIVE_ONE,
    NO_INPUT,
    check_example,
    make_input_spec,
    make_plan,
    untraceable,
)
from .sites import check_convertible


@dataclass(frozen=True)
class Conversion(ModelMetadata):
    """Record of how a model was converted; it travels with the converted model.

    Attributes:
        plan: every site, converted or excluded.
        audit: result of running one input; None if none was run.
        threat, num_classes, class_names, input_shape: as in :class:`ModelMetadata`.
    """

    plan: Plan
    audit: Audit | None = None

    def __str__(self) -> str:
        return self.plan.table(self.summary())

    def summary(self) -> str:
        """Return one line: how many activations were converted, and which were not."""
        sites = self.plan.converted
        main = len(sites) if self.audit is None else len(self.audit.ran)
        auxiliary = len(sites) - main
        total = main + len(self.audit.left if self.audit else ())
        text = f"{main} of {total} activations converted"
        if auxiliary:
            text += f" (+{auxiliary} that the audit's input did not reach)"
        if self.plan.excluded:
            text += f"; excluded: {self.plan.excluded_by_reason()}"
        if self.audit is None:
            text += f"; audit not run: {NO_INPUT}"
        return text


@entry_point
def convert(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            exclude: Iterable[str | type[nn.Module]] = (), gates: bool = False,
            input_bits: int | None = None, input_range: Any = None,
            threat: Threat | None = None) -> nn.Module:
    """Return a copy of model with low-bit quantized activations.

    Args:
        model: any classifier; it is not changed.
        bits: 1 to 8 (32 stays float), a QuantSpec, or {pattern: bits or QuantSpec}; patterns
            match site names as in a shell, or kinds; the last match counts.
        dynamic: thresholds and step are learned (DQA) instead of fixed (FQA).
        data: a re-iterable of model inputs or (inputs, labels). Thresholds minimise the mean
            squared error on 16 batches: the first ones, or, of a list or a DataLoader that does
            not shuffle, a representative choice. None: BatchNorm statistics, else seeded normal
            inputs.
        example: one input batch, for the audit and for calibration without data; None: the first
            batch of data, else an input of a shape that the model accepts.
        per_channel: thresholds per channel.
        exclude: names, patterns, kinds or classes of activations that stay float.
        gates: also convert sigmoids whose result is a factor of a product.
        input_bits: bits of an input quantizer; None: none.
        input_range: lowest and highest level of the input quantizer, in the values that the model
            reads: one pair, or one pair per channel.
        threat: stored with the model as ``model.quantguard.threat``, if its mean, std or bounds
            are known; None: the threat that is stored with the model already.

    Returns:
        The converted model, an instance of model's class, in model's modes, with a
        :class:`Conversion` in its attribute ``quantguard``.

    Raises:
        ConversionError: a model with nothing to convert, converted already, a ScriptModule, on
            the meta device, that cannot be copied, or whose forward the rewritten model does not
            reproduce bit for bit under ``bypass``.
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
    input_spec = make_input_spec(input_bits, input_range)
    batches = None if data is None else calibration_batches(data, original)
    if example is None and batches:
        example = batches[0]
    converted, plan, found = _converted(original, batches, example, bits, dynamic, per_channel,
                                        exclude, gates, input_spec)
    known = known_of(original)
    converted.__dict__["quantguard"] = Conversion(plan, found, **(
        known if threat is None else {**known, "threat": threat}))
    if found is None and plan.unread:
        warnings.warn(f"{NO_INPUT}: activations in {untraceable(plan)} stay float. {GIVE_ONE}",
                      stacklevel=2)
    return converted


def _converted(model: nn.Module, batches: list[Any] | None, example: Any, bits: Bits,
               dynamic: bool, per_channel: bool, exclude: Iterable[str | type[nn.Module]],
               gates: bool, input_spec: InputSpec | None) -> tuple[nn.Module, Plan, Audit | None]:
    """Convert by torch.fx graphs, or by running the model if the audit shows a graph to be wrong.

    Raises:
        ConversionError: neither way reproduces the float model.
    """
    best: tuple[nn.Module, Plan, Audit] | None = None
    for graphs in (True, False):
        try:
            plan = make_plan(model, bits, dynamic, example=example, per_channel=per_channel,
                             exclude=exclude, gates=gates, graphs=graphs, input_spec=input_spec)
        except QuantguardError as error:
            if best is not None:
                return best  # a pattern may match no site that is found without graphs
            if not graphs or not isinstance(error, ConversionError):
                raise
            example = find_example(model) if example is None else example
            if example is None:
                raise
            continue
        if example is None:
            example = plan.example if plan.example is not None else find_example(model)
        plan = replace(plan, example=None)  # it is not stored with the model
        converted = apply_plan(model, plan)
        # A forward may count its calls or store values: trial runs use a copy.
        tried = stand_in(converted)
        calibrate(tried, plan.converted, batches, example)
        placed = quantizers(tried)
        for name, quantizer in quantizers(converted).items():
            quantizer.load_state_dict(placed[name].state_dict())
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
        fix="Exclude the modules where this happens with exclude=, and please report the model.")


@entry_point
def inspect(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *,
            data: Iterable[Any] | None = None, example: Any = None, per_channel: bool = False,
            exclude: Iterable[str | type[nn.Module]] = (), gates: bool = False,
            input_bits: int | None = None, input_range: Any = None) -> Plan:
    """Return every activation site of model, and whether and why it is excluded.

    Takes the options of :func:`convert`, and changes nothing. For a converted model, returns the
    plan that it was converted by.

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
        check_example(unwrap(model), example)
    elif data is not None:
        example = next((unpack(batch)[0] for batch in data), None)
    return make_plan(unwrap(model), bits, dynamic, example=example, per_channel=per_channel,
                     exclude=exclude, gates=gates,
                     input_spec=make_input_spec(input_bits, input_range))


def with_input_quantizer(model: nn.Module, spec: InputSpec) -> nn.Module:
    """Return a copy of model, converted or not, with an input quantizer.

    Raises:
        ConversionError: the model has an input quantizer already.
    """
    model = unwrap(model)
    if any(map(is_input, quantizers(model))):
        raise ConversionError("the model has an input quantizer already")
    done = conversion_of(model)
    if done is None:
        done = Conversion(make_plan(model, FLOAT_BITS, input_spec=spec), **known_of(model))
    clone = duplicate(model)
    add_input_quantizer(clone, spec)
    clone.__dict__["quantguard"] = replace(done, plan=replace(done.plan, input=spec, example=None))
    return clone


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return how model was converted, or None for a float model."""
    done = getattr(unwrap(model), "__dict__", {}).get("quantguard")
    return done if isinstance(done, Conversion) else None


@entry_point
def restore(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model with float activations and its current weights.

    Raises:
        ConversionError: the model holds no quantized activation.
    """
    model = unwrap(model)
    if not quantizers(model):
        raise ConversionError(
            f"{type(model).__name__} is not converted: it holds no quantized activation")
    clone = duplicate(model)
    done = clone.__dict__.pop("quantguard", None)
    known = known_of(model)
    if any(value is not None for value in known.values()):
        annotate(clone, **known)
    remove_plan(clone, done.plan if isinstance(done, Conversion) else None)
    return clone
