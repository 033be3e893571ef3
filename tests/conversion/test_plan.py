"""Plans: bits by pattern, excluded sites, and errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from site_models import Named, bits, stack
from torch import nn

from quantguard.conversion.converter import convert, inspect
from quantguard.core.errors import ConversionError, SpecError
from quantguard.core.specs import QuantSpec

ALL = {"0.1": 2, "0.3": 2, "1.1": 2, "1.3": 2}


@pytest.mark.parametrize(("pattern", "expected"), [
    (5, {**ALL, "0.1": 5, "0.3": 5, "1.1": 5, "1.3": 5}),
    ({"*": 2, "1.*": 4}, {**ALL, "1.1": 4, "1.3": 4}),
    ({"*": 2, "gelu": 8}, {**ALL, "0.3": 8, "1.3": 8}),
    ({"*": 2, "0.1": 32}, {**ALL, "0.1": 32}),
    ({"0": 3}, {"0.1": 3, "0.3": 3, "1.1": 32, "1.3": 32}),
    ({"?.1": 1, "1.1": 7}, {"0.1": 1, "1.1": 7, "0.3": 32, "1.3": 32}),
    ({"1.1": 7, "*": 2}, ALL),  # the last match counts
    ({"*": 2, "1.1": QuantSpec(6, form="tanh")}, {**ALL, "1.1": 6}),
    (QuantSpec(3, True), dict.fromkeys(ALL, 3)),
])
def test_bits_by_pattern(pattern: Any, expected: dict[str, int]) -> None:
    plan = inspect(stack(), pattern)
    assert bits(plan) == expected
    assert {row["name"]: row["bits"] for row in plan.to_dict()["sites"]} == expected


def test_a_spec_is_complete_and_a_number_uses_the_options() -> None:
    own = QuantSpec(6, False, range_factor=0.5)
    plan = inspect(stack(), {"*": 2, "1.1": own}, True, per_channel=True)
    assert [site.spec for site in plan.sites] == [
        own if site.name == "1.1" else QuantSpec(2, True, True) for site in plan.sites]


@pytest.mark.parametrize(("exclude", "excluded"), [
    ("0.1", {"0.1"}), (["0.1", "1.3"], {"0.1", "1.3"}), ("1.*", {"1.1", "1.3"}),
    ("1", {"1.1", "1.3"}), ("gelu", {"0.3", "1.3"}), (nn.ReLU, {"0.1", "1.1"}),
    ([Named], {"1.1", "1.3"}), ("*.1", {"0.1", "1.1"}), ((), set()),
])
def test_exclude_by_name_pattern_kind_and_class(exclude: Any, excluded: set[str]) -> None:
    plan = inspect(stack(), exclude=exclude)
    assert {site.name for site in plan.excluded} == excluded
    assert {site.reason for site in plan.excluded} <= {"exclude="}


@pytest.mark.parametrize(("options", "nearest"), [
    ({"exclude": "relu_1"}, "relu"), ({"exclude": ["1.1", "gelo"]}, "gelu"),
    ({"bits": {"*": 2, "1.11": 3}}, "1.1"), ({"bits": {"layerX": 3}}, None),
    ({"exclude": nn.Tanh}, None)])
def test_a_pattern_that_matches_nothing_suggests_the_nearest(
        options: dict[str, Any], nearest: str | None) -> None:
    with pytest.raises(SpecError, match="matches no activation site") as caught:
        inspect(stack(), **options)
    assert (f"Did you mean {nearest!r}?" if nearest else "quantguard.inspect") in str(caught.value)


def test_nothing_to_convert_says_why() -> None:
    with pytest.raises(ConversionError, match="knows"):
        inspect(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match=r"All of them are excluded: 1 \(model output\)"):
        inspect(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(ConversionError, match=r"1 \(exclude=\)"):
        inspect(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), exclude="1")
    with pytest.raises(ConversionError, match="expected an nn.Module, got int"):
        inspect(3)  # type: ignore[arg-type]


def test_a_script_module_inside_a_model_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(1, 3))
    for model in (script, nn.Sequential(script, nn.ReLU(), nn.Linear(3, 3))):
        with pytest.raises(ConversionError, match="ScriptModule"):
            inspect(model)


def test_data_parallel_is_removed() -> None:
    model = stack()
    assert inspect(nn.DataParallel(model)).sites == inspect(model).sites


def test_inspecting_a_converted_model_gives_the_plan_it_was_made_by() -> None:
    model = stack()
    assert inspect(convert(model, 3)) == inspect(model, 3)
