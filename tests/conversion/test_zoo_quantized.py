"""Zoo models quantized: which sites are converted, their levels, gradients and thresholds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.utils.checkpoint
from conversion_zoo.base import rows, sequence
from conversion_zoo.checks import LEVELS, assert_active, assert_levels, kinds, run, warned
from conversion_zoo.layers import Encoder
from conversion_zoo.pairs import converted_pair, copy_of, pair_of, seeded_random
from conversion_zoo.spelled_out import OVERWRITING, Spelled
from conversion_zoo.table import ZOO, zoo
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of
from quantguard.nn.contexts import observing
from quantguard.nn.quant_activation import quantizers

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")]


@zoo("found")
def test_converted_and_excluded_sites(name: str) -> None:
    case, (_, _, converted) = ZOO[name], converted_pair(name)
    assert kinds(converted) == (case.converted, tuple(sorted(case.excluded)))
    assert len(quantizers(converted)) == len(case.converted.split())
    done = conversion_of(converted)
    assert done is not None and done.audit is not None
    assert done.audit.left == () and done.audit.identical


@zoo("reported")
def test_missed_activations_are_reported(name: str) -> None:
    """The audit names every activation that runs in float although it should not."""
    converted = converted_pair(name).converted
    done = conversion_of(converted)
    assert done is not None and done.audit is not None
    assert done.audit.left or not (
        Counter(ZOO[name].converted.split()) - Counter(kinds(converted)[0].split()))


@zoo("calibrated")
def test_every_quantizer_that_ran_was_calibrated(name: str) -> None:
    """Calibration reaches every quantizer that the example reaches."""
    case, (_, _, converted) = ZOO[name], converted_pair(name)
    clone, reached = copy_of(converted, False), set()
    with observing(clone, {q: lambda y, q=q: reached.add(q) for q in quantizers(clone)}):
        run(clone, case.inputs(5))
    done = conversion_of(converted)
    assert done is not None and done.audit is not None
    assert reached == set(done.audit.ran)


@zoo("active")
def test_quantizers_are_active_outside_bypass(name: str) -> None:
    case, (model, _, converted) = ZOO[name], converted_pair(name)
    with warned(case):
        assert_active(model, converted, case.inputs)


@zoo("levels")
def test_a_quantizer_outputs_only_its_levels(name: str) -> None:
    case, (_, _, converted) = ZOO[name], converted_pair(name)
    with warned(case):
        assert_levels(converted, case.inputs, case.unreached, case.settings)


@zoo("fed")
def test_later_operations_get_the_quantized_values(name: str) -> None:
    """This includes a second activation, and readers of a tensor that was overwritten."""
    converted = copy_of(converted_pair(name).converted, False)
    got: dict[str, list[Tensor]] = {}
    for path, module in converted.named_modules():
        module.register_forward_pre_hook(
            lambda m, args, path=path: got.update({path: [x.clone() for x in args]}))
    run(converted, rows(5))
    for path in ("last", *[p for p in list(got)[2:] if "tail" not in p and p in quantizers(
            converted)][1:]):
        assert all(x.unique().numel() <= LEVELS for x in got[path]), path
    overwritten = converted.form in OVERWRITING
    expected = got["last"][0] if overwritten else converted.first(rows(5)).detach()
    assert torch.equal(got["other"][0], expected)


@pytest.mark.parametrize("source", ["example", "data"])
@pytest.mark.parametrize("name", ["loud", "loud, not traceable", "loud encoder"])
def test_thresholds_are_in_the_range_of_the_values(name: str, source: str) -> None:
    """Values are in the thousands, where thresholds of a unit normal give constants."""
    def make() -> nn.Module:
        if "encoder" in name:
            model: nn.Module = Encoder("relu", False)
            loud = [layer.linear1 for layer in model.encoder.layers]
        else:
            model = Spelled("operator", "not" in name)
            loud = [model.first]
        with torch.no_grad():
            for layer in loud:
                layer.weight.mul_(1e4)
        return model

    x = sequence(5) if "encoder" in name else rows(5)
    _, _, converted = pair_of(make, x, **({"data": [x]} if source == "data" else {}))
    found = [q for path, q in quantizers(converted).items() if "tail" not in path]
    assert all(float(q.thresholds.max()) > 500 for q in found)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=(
        "quantizers that are chosen while the forward runs are missing in backward"))]
        if "not traceable" in name else [])
    for name in ZOO if "checkpoints" in name])
def test_a_checkpoint_recomputes_the_same_values(name: str) -> None:
    """Other quantizers in the second run would give the gradient of another network."""
    converted = copy_of(converted_pair(name).converted, True)
    calls: list[str] = []
    for path, module in quantizers(converted).items():
        module.register_forward_pre_hook(lambda m, x, path=path: calls.append(path)
                                         if m.instead is None or m.instead() is None else None)
    with seeded_random(0):
        result = converted(rows(5).requires_grad_())
        first = set(calls)
        calls.clear()
        result.sum().backward()
    assert set(calls) <= first
