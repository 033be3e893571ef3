"""Each check of the zoo fails on a model that is broken in the way it looks for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from conversion_zoo.base import TYPICAL, rows
from conversion_zoo.checks import (
    assert_active,
    assert_copied,
    assert_levels,
    assert_restored,
    assert_same_everywhere,
    assert_untouched,
)
from conversion_zoo.layers import OwnGate
from conversion_zoo.pairs import Pair, converted_copy, converted_pair, pair_of
from conversion_zoo.structure import Loops
from conversion_zoo.table import ZOO
from torch import nn

from quantguard.conversion.audit import audit
from quantguard.conversion.converter import conversion_of, convert
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import QuantActivation, quantizers

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")]


def test_an_activation_that_is_left_in_float_is_reported() -> None:
    model, converted = converted_pair("loop over layers").model, converted_copy("loop over layers")
    done = conversion_of(converted)
    assert done is not None and audit(model, converted, done.plan, rows(5)).left == ()
    converted.head = nn.Sequential(converted.head, nn.ReLU())
    found = audit(model, converted, done.plan, rows(5))
    assert found.left == ("head.1: relu",) and not found.identical
    converted.head[1] = OwnGate()
    assert audit(model, converted, done.plan, rows(5)).left == ("head.1: hardsigmoid",)


@pytest.mark.parametrize("name", ["closures", "x sigmoid", "in place, then read"])
def test_a_wrong_function_is_detected_under_bypass(name: str) -> None:
    case, model = ZOO[name], converted_pair(name).model
    converted = converted_copy(name)
    assert_same_everywhere(model, converted, case.inputs, each=TYPICAL)
    next(iter(quantizers(converted).values())).function = nn.Softplus()
    with pytest.raises(AssertionError, match="outputs"):
        assert_same_everywhere(model, converted, case.inputs, each=TYPICAL)


def test_a_wrong_gradient_is_detected_under_bypass() -> None:
    model, converted = converted_pair("closures").model, converted_copy("closures")
    converted.second.register_full_backward_hook(lambda m, x, y: tuple(2 * g for g in x))
    with pytest.raises(AssertionError, match="gradients"):
        assert_same_everywhere(model, converted, rows, each=TYPICAL)


def test_wrong_functions_in_an_intercepted_forward_are_detected(monkeypatch: Any) -> None:
    model, converted = converted_pair("branches on one line").model, converted_copy(
        "branches on one line")
    found = quantizers(converted)
    assert list(found) == ["relu", "gelu"]
    found["relu"].function, found["gelu"].function = nn.GELU(), nn.ReLU()
    assert_same_everywhere(model, converted, rows)  # bypass does not detect it
    monkeypatch.setattr(QuantActivation, "bypassed", property(lambda self: False))
    with pytest.raises(AssertionError, match="outputs"):
        assert_same_everywhere(model, converted, rows)


def test_too_many_levels_and_unreached_quantizers_are_detected() -> None:
    finer = convert(Loops(), 3, example=rows(5))
    with pytest.raises(AssertionError):
        assert_levels(finer, rows)
    with pytest.raises(AssertionError):
        assert_levels(converted_copy("loop over layers"), rows, ("act_2",))
    assert_levels(converted_copy("loop over layers"), rows)


def test_quantizers_that_do_nothing_are_detected() -> None:
    model, converted = converted_pair("closures").model, converted_copy("closures")
    assert_active(model, converted, rows)
    with bypass(converted), pytest.raises(AssertionError, match="not quantized"):
        assert_active(model, converted, rows)


def test_remains_and_changes_of_restore_are_detected() -> None:
    model, converted = converted_pair("closures").model, converted_copy("closures")
    assert_restored(model, converted, rows)
    converted.more = nn.ReLU()
    with pytest.raises(AssertionError):
        assert_restored(model, converted, rows)
    del converted.more
    nn.init.zeros_(converted.first.weight)
    with pytest.raises(AssertionError, match="outputs"):
        assert_restored(model, converted, rows)


def test_a_copy_that_computes_something_else_is_detected() -> None:
    model, converted = converted_pair("closures").model, converted_copy("closures")

    def moved(m: nn.Module) -> nn.Module:
        q = m.get_submodule("tanh")
        q.set_thresholds(q.thresholds * 3, q.step)
        return m

    assert_copied(model, converted, rows, copy.deepcopy)
    with pytest.raises(AssertionError, match="outputs"):
        assert_copied(model, converted, rows, moved)


def test_a_changed_model_is_detected() -> None:
    def touched(how: Callable[[Pair], Any]) -> None:
        pair = pair_of(Loops, rows(5))
        assert_untouched(pair)
        how(pair)
        with pytest.raises(AssertionError):
            assert_untouched(pair)

    touched(lambda pair: nn.init.zeros_(pair.model.head.weight))
    touched(lambda pair: pair.model.act.eval())
    touched(lambda pair: setattr(pair.model, "last", 1))
    touched(lambda pair: setattr(pair.converted.head, "weight", pair.model.head.weight))
