"""Zoo models in float: bypass, restore, state dicts and copies equal the float model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conversion_zoo.base import TYPICAL, Net, rows
from conversion_zoo.checks import (
    assert_copied,
    assert_restored,
    assert_same_everywhere,
    assert_untouched,
    saved,
    warned,
)
from conversion_zoo.pairs import converted_pair, copy_of, pair_of
from conversion_zoo.side_effects import MakesTensors
from conversion_zoo.table import ZOO, zoo
from torch import Tensor

from quantguard.conversion.converter import conversion_of
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import QuantActivation

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")]


@zoo("bypass")
def test_bypass_is_the_float_model_bit_for_bit(name: str) -> None:
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    assert_same_everywhere(model, converted, case.inputs, each=case.settings)


@zoo("transparent")
def test_the_converted_forward_computes_the_float_one(name: str, monkeypatch: Any) -> None:
    """With bypass switched off inside, each call must still get its own function."""
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    done = conversion_of(converted)
    assert done is not None
    if not case.fused and not any(site.intercepted for site in done.plan.sites):
        return  # bypass runs the same forward
    monkeypatch.setattr(QuantActivation, "bypassed", property(lambda self: False))
    with warned(case):
        # Without gradients torch takes fused paths, whose results differ in the last bits.
        assert_same_everywhere(model, converted, case.inputs, bypass, case.settings,
                               (True,) if case.fused else (False, True))


@zoo("restored")
def test_restore_returns_the_float_model(name: str) -> None:
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    assert_restored(model, converted, case.inputs)


@zoo("loaded")
def test_a_float_state_dict_loads(name: str) -> None:
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    other, clone = copy_of(model, True), copy_of(converted, True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    clone.load_state_dict(other.state_dict(), strict=True)
    assert_same_everywhere(other, clone, case.inputs, each=TYPICAL)


@zoo("copied")
def test_copies_and_pickles_of_copies(name: str) -> None:
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    assert_copied(model, converted, case.inputs, saved if case.pickles else copy.deepcopy)


@zoo("untouched")
def test_the_float_model_is_untouched(name: str) -> None:
    assert_untouched(converted_pair(name))


class Scaled(Net):
    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.scale, self.opaque = 1.0, opaque

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.opaque and bool(x.detach().sum() > 1e6):
            return h
        return self.head(F.relu(h) * self.scale)


@pytest.mark.parametrize("opaque", [
    pytest.param(False, marks=pytest.mark.xfail(strict=True, reason=(
        "a graph fixes the plain attributes that a forward reads"))), True])
def test_an_attribute_that_is_set_later_takes_effect(opaque: bool) -> None:
    """Examples are a temperature or a drop rate that follows a schedule."""
    model, _, converted = pair_of(functools.partial(Scaled, opaque), rows(5))
    model.scale = converted.scale = 3.0
    assert_same_everywhere(model, converted, rows, each=TYPICAL)
    assert_same_everywhere(model, saved(converted), rows, each=TYPICAL)


def test_a_converted_model_can_change_its_dtype() -> None:
    """Tensors that a forward creates in the dtype of its weights follow the weights."""
    model, _, converted = pair_of(MakesTensors, rows(5))
    model, converted = copy.deepcopy(model).bfloat16(), copy.deepcopy(converted).bfloat16()
    assert_same_everywhere(model, converted, lambda n: rows(n).bfloat16(), each=TYPICAL)
