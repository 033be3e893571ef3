"""Make the plan that ``convert`` applies, and explain why there is nothing to convert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.errors import ConversionError, SpecError
from ..core.model_calls import run
from ..core.module_utils import duplicate
from ..core.nested_tensors import as_model_input
from ..core.runtime import seeded
from ..core.specs import InputSpec, plain
from .plan import Bits, Plan, assign
from .sites import check_convertible, find_sites

NO_INPUT = "no input was found that the model accepts"
GIVE_ONE = "Give one: example=torch.randn(1, 3, 224, 224), or data= (--input-shape 3,224,224)."


def make_plan(model: nn.Module, bits: Bits = 2, dynamic: bool = False, *, example: Any = None,
              per_channel: bool = False, exclude: Iterable[str | type[nn.Module]] = (),
              gates: bool = False, graphs: bool = True,
              input_spec: InputSpec | None = None) -> Plan:
    """Return the plan that :func:`convert` applies.

    Args:
        model, bits, dynamic, example, per_channel, exclude, gates: as for :func:`convert`.
        graphs: whether to trust torch.fx graphs; False finds all activations by running model.
        input_spec: the input quantizer; None: none.

    Raises:
        ConversionError: nothing to convert, converted already, or a ScriptModule.
        SpecError: a pattern that matches nothing, or impossible bits.
    """
    check_convertible(model)
    found = find_sites(model, example, graphs=graphs)
    plan = replace(assign(found, model, bits, dynamic, per_channel, exclude, gates),
                   input=input_spec)
    if not plan.converted and input_spec is None:
        if plan.unread and example is None and plan.example is None:
            raise ConversionError(
                f"{NO_INPUT}, a {type(model).__name__}, and its activations are found by running",
                why=f"torch.fx cannot trace {untraceable(plan)}.", fix=GIVE_ONE)
        if plan.unread and example is not None:
            check_example(model, example)
        why = "None of its modules calls an activation that quantguard knows."
        if plan.sites:
            why = "All of them are excluded: " + "; ".join(
                f"{s.name or 'the model itself'} ({s.reason})" for s in plan.sites[:5])
        raise ConversionError(f"{type(model).__name__} has no activations to convert", why=why)
    return plan


def check_example(model: nn.Module, example: Any) -> None:
    """Raise a DataError if the model does not accept the example."""
    with torch.no_grad(), seeded(0):  # run a copy: a forward may change its module
        run(duplicate(model).eval(), as_model_input(example, model), "the example")


def untraceable(plan: Plan) -> str:
    """Return the forwards that torch.fx cannot trace, and why, as text."""
    return "; ".join(f"{name or 'the model itself'} ({why})"
                     for name, why in list(plan.unread.items())[:3])


def make_input_spec(bits: int | None, ends: Any) -> InputSpec | None:
    """Return the input quantizer that ``input_bits`` and ``input_range`` ask for.

    Raises:
        SpecError: one without the other, or something that is not a range.
    """
    if (bits is None) != (ends is None):
        raise SpecError("input_bits and input_range (--input-bits, --input-range) go together",
                        fix="input_range is (lowest, highest) of the values that the model reads.")
    if bits is None:
        return None
    try:
        pairs = [ends] if isinstance(plain(ends[0]), (int, float)) else list(ends)
        low, high = zip(*((a, b) for a, b in pairs), strict=True)
    except (TypeError, ValueError, IndexError, KeyError):
        raise SpecError(f"input_range={ends!r} is not a (low, high) pair",
                        fix="Give (low, high), or one such pair per channel.") from None
    return InputSpec(bits, low, high)
