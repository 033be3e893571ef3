"""The table of all zoo models, and the checks that some of them are known to fail."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from conversion_zoo import (
    classes,
    control_flow,
    functions,
    layers,
    side_effects,
    spelled_out,
    structure,
)
from conversion_zoo.base import Case

ZOO: dict[str, Case] = {
    **functions.CASES, **structure.CASES, **control_flow.CASES, **layers.CASES,
    **side_effects.CASES, **classes.CASES, **spelled_out.CASES}


class Limit(NamedTuple):
    """A known limitation, and the checks that models fail because of it; no checks: all."""

    what: str
    names: tuple[str, ...]
    checks: tuple[str, ...] = ()


def both(*forms: str) -> tuple[str, ...]:
    return tuple(f"{form}{', not traceable' if opaque else ''}" for form in forms
                 for opaque in (False, True))


LIMITS: tuple[Limit, ...] = (
    Limit("a child that its parent calls directly gets two quantizers, and one never runs", (
        "slices of a Sequential", "checkpoints, not traceable",
        "reentrant checkpoints, not traceable"), ("found", "calibrated")),
    Limit("calls in an inner forward are planned for the outer one, too",
        ("self.forward", "child's forward, not traceable"), ("found", "levels")),
    Limit("a module that an argument chooses is listed as never called, and the audit accepts this",
        ("ModuleDict by an argument",), ("found", "reported")),
    Limit("a function that is passed as an argument is listed as not reached",
        ("function as an argument", "function as an optional argument"), ("found",)),
    Limit("a part of an activation that is also used alone is not converted",
        ("parts used twice, not traceable",), ("found", "reported")),
    Limit("a forward that is an attribute of the instance is not found",
        ("forward of the instance",)),
    Limit("a module that the forward creates is not found", both("made on the fly"),
        ("found", "fed")),
    Limit("neither the grid nor the audit knows these operations",
        both("index assignment", "in a view"), ("found", "reported", "fed")),
    Limit("a quantizer inside an autograd.Function does not learn", ("autograd.Function, learned",),
        ("active",)),
    Limit("in place, the gradient is computed from the input, with other last bits",
        ("selu_",), ("bypass",)),
    Limit("in place, the gradient is computed from the input, with other last bits",
        ("selu_, not traceable",), ("transparent",)),
)


def zoo(check: str) -> Any:
    """Parametrize a check over the zoo, with the known failures of LIMITS."""
    def marks(name: str) -> list[pytest.MarkDecorator]:
        return [pytest.mark.xfail(reason=limit.what, strict=True) for limit in LIMITS
                if (check in limit.checks or not limit.checks) and name in limit.names][:1]

    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=marks(name)) for name, case in ZOO.items()
        if check in case.checks or (not case.checks and check != "fed")
        if check != "reported" or any(name in b.names and "found" in b.checks for b in LIMITS)])
